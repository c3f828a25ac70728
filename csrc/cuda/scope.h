// The part of torch that the operators run under: a device, and the stream that is current on it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <memory>

namespace sassha::cuda {

// Makes a tensor's device the current one for as long as it lives.
class Scope {
 public:
  explicit Scope(const torch::stable::Tensor& tensor);
  ~Scope();
  void* stream() const { return stream_; }

 private:
  struct Guard;
  std::unique_ptr<Guard> guard_;
  void* stream_ = nullptr;
};

}  // namespace sassha::cuda
