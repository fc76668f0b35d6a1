// What Python sees of the extension, besides the operators.
#include "cpu/kernels.h"
#include "torch/plan.h"

namespace mup2 {
namespace {

// (tensor, first element, number of elements) of some chunks of tensors of these sizes, as the kernels would walk over
// them. For tests: tensors can be larger than memory.
std::vector<std::tuple<int64_t, int64_t, int64_t>> walk(const std::vector<int64_t>& sizes,
                                                        const std::vector<int64_t>& chunks) {
  std::vector<Entry> entries(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) entries[i].numel = sizes[i];
  std::vector<std::tuple<int64_t, int64_t, int64_t>> found;
  in_batches<PerturbBatch>(entries, {}, [&](const PerturbBatch& batch, Types) {
    for (int64_t chunk : chunks) {
      const int64_t local = chunk - batch.first_partial;
      if (local < 0 || local >= batch.n_chunks) continue;
      const Chunk c = locate(batch, local);
      found.emplace_back(batch.first_tensor + c.item, c.begin, c.count);
    }
  });
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::class_<Plan>(m, "Plan")
      .def(py::init<>())
      .def_readwrite("may_sum", &Plan::may_sum)
      .def("climb", &Plan::climb)
      .def("descend", &Plan::descend)
      .def("restore", &Plan::restore)
      .def("finite", &Plan::finite)
      .def("skipped", &Plan::skipped)
      .def("memory", &Plan::memory)
      .def("norms", &Plan::norms);
  m.def("is_dense", is_dense);
  m.def("walk", walk);
  m.attr("chunk") = kChunk;
  m.attr("tensors_per_launch") =
      py::dict(py::arg("norm") = +NormBatch::kCapacity, py::arg("perturb") = +PerturbBatch::kCapacity,
               py::arg("sgd") = +UpdateBatch<Sgd>::kCapacity, py::arg("adam") = +UpdateBatch<Adam>::kCapacity);
  m.attr("instruction_set") = cpu_kernels().name;
  m.attr("cuda") = kBuiltWithCuda;
}

}  // namespace mup2
