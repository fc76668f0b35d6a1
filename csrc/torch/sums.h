// What an update leaves behind for the norm of the next climb by first moments.
#pragma once
#include <c10/util/intrusive_ptr.h>

#include <unordered_map>
#include <vector>

#include "core/packing.h"
#include "torch/tensors.h"

namespace mup2 {

// The sums of squares over the chunks of moments. They hold until a moment changes, which torch counts as its version.
class MomentSums {
 public:
  // Where an update is to write the sums of a moment. They are not known before confirm().
  double* room(const Tensor& m) {
    auto found = known_.find(m.unsafeGetTensorImpl());
    if (found == known_.end()) {
      for (auto old = known_.begin(); old != known_.end();)
        old = old->second.moment.expired() ? known_.erase(old) : std::next(old);
      found = known_.try_emplace(m.unsafeGetTensorImpl(), m).first;
    }
    Known& known = found->second;
    const int64_t chunks = chunks_of(m.numel());
    if (!known.sums.defined() || known.sums.numel() != chunks || known.sums.device() != m.device())
      known.sums = at::zeros({chunks}, at::TensorOptions().device(m.device()).dtype(at::kDouble));
    known.valid = false;
    written_.push_back(&known);
    return known.sums.data_ptr<double>();
  }

  // For an update that sums nothing.
  double* drop(const Tensor& m) {
    const auto found = known_.find(m.unsafeGetTensorImpl());
    if (found != known_.end()) found->second.valid = false;
    return nullptr;
  }

  // The update has written to all rooms.
  void confirm() {
    for (Known* known : written_) {
      const auto moment = known->moment.lock();
      known->valid = moment && !moment->is_inference();
      if (known->valid) known->version = moment->version_counter().current_version(), known->data = moment->data();
    }
    written_.clear();
  }
  void forget() { written_.clear(); }  // rooms of an update that did not run

  // The sums of a moment, or null if they are not known.
  double* find(const Tensor& m) const {
    const auto found = known_.find(m.unsafeGetTensorImpl());
    if (found == known_.end() || !found->second.valid) return nullptr;
    const Known& known = found->second;
    const auto& moment = *m.unsafeGetTensorImpl();
    const bool same = moment.version_counter().current_version() == known.version && moment.data() == known.data;
    return same ? known.sums.data_ptr<double>() : nullptr;
  }

  void append_to(std::vector<Tensor>& tensors) const {
    for (const auto& [moment, known] : known_) tensors.push_back(known.sums);
  }

 private:
  struct Known {
    explicit Known(const Tensor& m) : moment(m.getIntrusivePtr()) {}
    // While this exists, no other tensor has the moment's address.
    c10::weak_intrusive_ptr<at::TensorImpl, c10::UndefinedTensorImpl> moment;
    Tensor sums;
    const void* data = nullptr;
    uint32_t version = 0;
    bool valid = false;
  };
  std::unordered_map<const at::TensorImpl*, Known> known_;
  std::vector<Known*> written_;  // since the last confirm()
};

}  // namespace mup2
