// What an update leaves behind for the norm of the next climb by first moments.
#pragma once
#include <map>
#include <vector>

#include "torch/dispatch.h"

namespace mup2 {

// The sums of squares over the chunks of moments. They serve one climb, and only for moments that nobody has changed
// since the update, as far as torch counts changes. A change through .data or NumPy is not counted.
class MomentSums {
 public:
  // The update begins. It will change moments, so that all sums of an earlier one are lost.
  void clear() { known_.clear(), next_ = 0; }

  // Announces the sums of a moment. Returns the index that its entry must have in place().
  int add(const Tensor& m) {
    known_.push_back({m});
    return int(known_.size()) - 1;
  }

  // Where the update of these entries of one device writes its sums, a number per chunk.
  double* place(Slice entries, at::Device device) {
    int64_t chunks = 0;
    for (const DeviceEntry& e : entries) {
      if (e.ptr[kM] && e.numel) known_[e.index].chunk = chunks;
      chunks += chunks_of(e.numel);
    }
    Tensor& sums = sums_[device];
    if (!sums.defined() || sums.numel() < chunks)
      sums = at::empty({chunks}, at::TensorOptions().device(device).dtype(at::kDouble));
    return sums.data_ptr<double>();
  }

  // The update has run.
  void confirm() {
    for (Known& known : known_) {
      if (known.moment.is_inference()) continue;  // its changes are not counted
      known.version = known.moment._version(), known.data = known.moment.const_data_ptr();
    }
  }

  // The sums of a moment, null if they are not known. Moments are asked for in the order of add().
  double* take(const Tensor& m) {
    while (next_ < known_.size() && !known_[next_].moment.is_same(m)) ++next_;
    if (next_ == known_.size()) return nullptr;
    const Known& known = known_[next_];
    if (!known.data || known.data != m.const_data_ptr() || known.version != m._version()) return nullptr;
    return sums_.at(m.device()).data_ptr<double>() + known.chunk;
  }

 private:
  struct Known {
    Tensor moment;  // kept, so that no other tensor gets its address
    int64_t chunk = 0, version = 0;
    const void* data = nullptr;
  };

  std::vector<Known> known_;
  size_t next_ = 0;
  std::map<at::Device, Tensor, DeviceOrder> sums_;
};

}  // namespace mup2
