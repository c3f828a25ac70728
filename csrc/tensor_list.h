// A list argument of an operator as dense memory: what the kernels see of torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
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
  explicit TensorList(StableListHandle list) {
    take_apart(list);
    for (int64_t i = 0; i < size(); ++i) {
      if (is_dense(i)) {
        borrow(i);
      } else {
        work_on(i, torch::stable::contiguous(tensor(i)));
      }
    }
  }

  // Tensors with the shapes of `model`, in the memory order of `model`.
  TensorList(StableListHandle list, const TensorList& model) {
    take_apart(list);
    STD_TORCH_CHECK(size() == model.size(), "expected ", model.size(), " tensors, one for each parameter, got ",
                    size());
    for (int64_t i = 0; i < size(); ++i) {
      const AtenTensorHandle target = model.working(i);
      STD_TORCH_CHECK(dim(handles_[i]) == dim(target) && equal(i, target, aoti_torch_get_sizes), "tensor ", i,
                      " has another shape than its parameter");
      if (equal(i, target, aoti_torch_get_strides)) {
        borrow(i);
      } else {
        Tensor copy = torch::stable::to(torch::stable::empty_like(duplicate(target)), dtype());
        torch::stable::copy_(copy, tensor(i));
        work_on(i, copy);
      }
    }
  }

  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;

  int64_t size() const { return static_cast<int64_t>(handles_.size()); }
  bool empty() const { return handles_.empty(); }
  ScalarType dtype() const { return dtype_; }
  int64_t numel(int64_t i) const { return numel_[i]; }
  Tensor tensor(int64_t i) const { return duplicate(handles_[i]); }

  template <class P>
  P* data(int64_t i) const {
    return static_cast<P*>(data_[i]);
  }

  // Copies what was written to working copies back to their tensors.
  void write_back() const {
    for (size_t c = 0; c < copies_.size(); ++c) {
      Tensor original = tensor(copied_[c]);
      torch::stable::copy_(original, copies_[c]);
    }
  }

 private:
  struct Handles : std::vector<AtenTensorHandle> {
    ~Handles() {
      for (const AtenTensorHandle handle : *this) aoti_torch_delete_tensor_object(handle);
    }
  };

  Handles handles_;
  std::vector<int64_t> numel_;
  std::vector<void*> data_;
  std::vector<Tensor> copies_;
  std::vector<int64_t> copied_;
  ScalarType dtype_ = ScalarType::Undefined;

  void take_apart(StableListHandle list) {
    const int64_t size = list_size(list);
    handles_.reserve(size);
    for (int64_t i = 0; i < size; ++i) {
      StableIValue element;
      STABLE_TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &element));
      handles_.push_back(torch::stable::detail::to<AtenTensorHandle>(element));
    }
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
    numel_.resize(size);
    data_.resize(size);
    if (size == 0) return;
    dtype_ = tensor(0).scalar_type();
    const int32_t first_dtype = dtype_code(0), first_device = device_code(0);
    for (int64_t i = 0; i < size; ++i) {
      STD_TORCH_CHECK(dtype_code(i) == first_dtype, "tensor ", i, " has another dtype than the first one of its list");
      STD_TORCH_CHECK(device_code(i) == first_device, "tensor ", i,
                      " is on another device than the first one of its list");
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(handles_[i], &numel_[i]));
    }
  }

  void borrow(int64_t i) { STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handles_[i], &data_[i])); }

  void work_on(int64_t i, const Tensor& copy) {
    copies_.push_back(copy);
    copied_.push_back(i);
    data_[i] = copy.mutable_data_ptr();
  }

  AtenTensorHandle working(int64_t i) const {
    const auto copied = std::find(copied_.begin(), copied_.end(), i);
    return copied == copied_.end() ? handles_[i] : copies_[copied - copied_.begin()].get();
  }

  static Tensor duplicate(AtenTensorHandle handle) {
    AtenTensorHandle copy = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle, &copy));
    return Tensor(copy);
  }

  int32_t dtype_code(int64_t i) const {
    int32_t code = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handles_[i], &code));
    return code;
  }

  int32_t device_code(int64_t i) const {
    int32_t code = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handles_[i], &code));
    return code;
  }

  static int64_t dim(AtenTensorHandle handle) {
    int64_t dim = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
    return dim;
  }

  using GetInts = AOTITorchError (*)(AtenTensorHandle, int64_t**);

  static const int64_t* ints(AtenTensorHandle handle, GetInts get) {
    int64_t* values = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(get(handle, &values));
    return values;
  }

  bool equal(int64_t i, AtenTensorHandle other, GetInts get) const {
    const int64_t* values = ints(handles_[i], get);
    return std::equal(values, values + dim(handles_[i]), ints(other, get));
  }

  // Whether the dimensions, from the smallest stride up, fill memory without gaps or overlap.
  bool is_dense(int64_t i) const {
    const int64_t dims = dim(handles_[i]);
    const int64_t* sizes = ints(handles_[i], aoti_torch_get_sizes);
    const int64_t* strides = ints(handles_[i], aoti_torch_get_strides);
    int64_t expected = 1;
    for (int64_t d = dims - 1; d >= 0 && (sizes[d] == 1 || strides[d] == expected); --d) expected *= sizes[d];
    if (expected == numel_[i] || numel_[i] == 0) return true;  // row-major, as nearly always
    std::vector<int64_t> order(dims);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
    expected = 1;
    for (const int64_t d : order) {
      if (sizes[d] == 1) continue;
      if (strides[d] != expected) return false;
      expected *= sizes[d];
    }
    return true;
  }
};

}  // namespace sassha
