// A list argument of an operator as dense memory: what the kernels see of torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <numeric>
#include <optional>
#include <vector>

namespace sassha {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int64_t list_size(StableListHandle list) {
  size_t size = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
  return static_cast<int64_t>(size);
}

// Borrows the memory of every tensor whose elements fill it without gaps, in whatever order of dimensions, and works on
// a row-major copy of any other. Takes the list apart by hand: std::vector<Tensor> costs twice as much host time.
class TensorList {
 public:
  // Refuses tensors with other shapes or strides than their rows of layouts (csrc/schema.cpp), where these are given.
  explicit TensorList(StableListHandle list, const std::optional<Tensor>& layouts = std::nullopt) {
    take_apart(list);
    if (layouts) check_layouts(*layouts);
    for (size_t i = 0; i < entries_.size(); ++i) {
      if (!is_dense(entries_[i])) work_on(i, torch::stable::contiguous(tensor(i)));
    }
  }

  // Tensors with the shapes of `model`, in the memory order of `model`.
  TensorList(StableListHandle list, const TensorList& model) {
    take_apart(list);
    STD_TORCH_CHECK(size() == model.size(), "expected ", model.size(), " tensors, one per parameter, got ", size());
    for (size_t i = 0; i < entries_.size(); ++i) {
      const Entry &entry = entries_[i], &target = model.entries_[i];
      STD_TORCH_CHECK(entry.dim == target.dim && std::equal(entry.sizes, entry.sizes + entry.dim, target.sizes),
                      "tensor ", i, " has another shape than its parameter");
      if (!std::equal(entry.strides, entry.strides + entry.dim, target.strides)) {
        Tensor copy = torch::stable::to(torch::stable::empty_like(model.working(i)), dtype());
        torch::stable::copy_(copy, tensor(i));
        work_on(i, copy);
      }
    }
  }

  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;

  int64_t size() const { return static_cast<int64_t>(entries_.size()); }
  bool empty() const { return entries_.empty(); }
  ScalarType dtype() const { return dtype_; }
  int64_t numel(int64_t i) const { return entries_[i].numel; }
  Tensor tensor(int64_t i) const { return duplicate(entries_[i].handle); }

  template <class P>
  P* data(int64_t i) const {
    return static_cast<P*>(entries_[i].data);
  }

  // Refuses offsets at which these tensors would not lie within their parts of a flat buffer.
  void check_parts(const std::vector<int64_t>& offsets, const Tensor& flat) const {
    STD_TORCH_CHECK(static_cast<int64_t>(offsets.size()) == size(), "expected one offset per tensor");
    for (int64_t i = 0; i < size(); ++i) {
      const bool followed = i + 1 < size() && offsets[i + 1] > offsets[i];
      const int64_t end = followed ? offsets[i + 1] : flat.numel();
      STD_TORCH_CHECK(offsets[i] >= 0 && offsets[i] + numel(i) <= end, "tensor ", i,
                      " does not fit its part of the state");
    }
  }

  // Refuses tensors on another device than this one: CUDA kernels would read any address they are given.
  void check_device(const Tensor& tensor) const {
    const int32_t type = code(tensor.get(), aoti_torch_get_device_type);
    const int32_t index = code(tensor.get(), aoti_torch_get_device_index);
    for (size_t i = 0; i < entries_.size(); ++i) {
      const AtenTensorHandle handle = entries_[i].handle;
      STD_TORCH_CHECK(
          code(handle, aoti_torch_get_device_type) == type && code(handle, aoti_torch_get_device_index) == index,
          "tensor ", i, " is on another device than the first parameter");
    }
  }

  // Copies what was written to working copies back to their tensors.
  void write_back() const {
    for (const auto& [i, copy] : copies_) {
      Tensor original = tensor(i);
      torch::stable::copy_(original, copy);
    }
  }

 private:
  struct Entry {
    AtenTensorHandle handle;
    int64_t dim;
    int64_t* sizes;
    int64_t* strides;  // those of the working copy, where there is one
    int64_t numel;
    void* data;
  };

  struct Entries : std::vector<Entry> {
    ~Entries() {
      for (const Entry& entry : *this) aoti_torch_delete_tensor_object(entry.handle);
    }
  };

  Entries entries_;
  std::map<int64_t, Tensor> copies_;
  ScalarType dtype_ = ScalarType::Undefined;

  void check_layouts(const Tensor& layouts) const {
    STD_TORCH_CHECK(layouts.scalar_type() == ScalarType::Long && layouts.device().is_cpu() && layouts.is_contiguous(),
                    "layouts must be int64 on the CPU, and contiguous");
    STD_TORCH_CHECK(layouts.dim() == 2 && layouts.size(0) == size(), "layouts must have one row per tensor");
    const int64_t width = layouts.size(1);
    const int64_t* row = static_cast<const int64_t*>(layouts.const_data_ptr());
    for (int64_t i = 0; i < size(); ++i, row += width) {
      const Entry& entry = entries_[i];
      const bool same = row[0] == entry.dim && 1 + 2 * entry.dim <= width &&
                        std::equal(entry.sizes, entry.sizes + entry.dim, row + 1) &&
                        std::equal(entry.strides, entry.strides + entry.dim, row + 1 + entry.dim);
      STD_TORCH_CHECK(same, "tensor ", i, " has another shape or other strides than when its state was made");
    }
  }

  void take_apart(StableListHandle list) {
    const int64_t size = list_size(list);
    entries_.reserve(size);
    for (int64_t i = 0; i < size; ++i) {
      StableIValue element;
      STABLE_TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &element));
      entries_.push_back({torch::stable::detail::to<AtenTensorHandle>(element), 0, nullptr, nullptr, 1, nullptr});
    }
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
    if (size == 0) return;
    dtype_ = tensor(0).scalar_type();
    const int32_t dtype = code(entries_[0].handle, aoti_torch_get_dtype);
    for (size_t i = 0; i < entries_.size(); ++i) {
      Entry& entry = entries_[i];
      STD_TORCH_CHECK(code(entry.handle, aoti_torch_get_dtype) == dtype, "tensor ", i,
                      " has another dtype than the first of its list");
      describe(entry, entry.handle);
    }
  }

  // Reads shape and memory of an entry off a tensor: its own, or its working copy.
  static void describe(Entry& entry, AtenTensorHandle handle) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &entry.dim));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &entry.sizes));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &entry.strides));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &entry.data));
    entry.numel = std::accumulate(entry.sizes, entry.sizes + entry.dim, int64_t{1}, std::multiplies<int64_t>());
  }

  void work_on(int64_t i, const Tensor& copy) {
    describe(entries_[i], copy.get());
    copies_.emplace(i, copy);
  }

  Tensor working(int64_t i) const {
    const auto copy = copies_.find(i);
    return copy == copies_.end() ? tensor(i) : copy->second;
  }

  static Tensor duplicate(AtenTensorHandle handle) {
    AtenTensorHandle copy = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle, &copy));
    return Tensor(copy);
  }

  static int32_t code(AtenTensorHandle handle, AOTITorchError (*get)(AtenTensorHandle, int32_t*)) {
    int32_t value = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(get(handle, &value));
    return value;
  }

  // Whether the dimensions, from the smallest stride up, fill memory without gaps or overlap.
  static bool is_dense(const Entry& entry) {
    int64_t expected = 1;
    for (int64_t d = entry.dim - 1; d >= 0; --d) {
      if (entry.sizes[d] != 1 && entry.strides[d] != expected) break;
      expected *= entry.sizes[d];
      if (d == 0) return true;
    }
    if (entry.dim == 0 || entry.numel == 0) return true;
    std::vector<int64_t> order(entry.dim);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return entry.strides[a] < entry.strides[b]; });
    expected = 1;
    for (const int64_t d : order) {
      if (entry.sizes[d] == 1) continue;
      if (entry.strides[d] != expected) return false;
      expected *= entry.sizes[d];
    }
    return true;
  }
};

}  // namespace sassha
