// What kernels/device.cuh knows of torch, for operators that run in the emulator on tensors of the CPU: memory in pages of its own for
// what a call returns and what it needs on its way.
#pragma once

#define CLIPFAST_DEVICE CPU

inline std::deque<emulated::Guarded> results;  // for good: a tensor looks into them

inline Tensor fresh(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  std::vector<int64_t> steps(sizes.size(), 1);
  int64_t count = 1;
  for (size_t i = sizes.size(); i-- > 0; count *= sizes[i]) steps[i] = count;
  void* const data = results.emplace_back(count * (type == ScalarType::Float ? 4 : 2)).data;
  return torch::stable::from_blob(data, sizes, steps, like.device(), type);
}

struct Guard {
  explicit Guard(const Tensor&) {}
};

// A call on a GPU of seven SMs.
inline Call call_on(const char* op, const Tensor&) {
  const auto held = std::make_shared<std::deque<emulated::Guarded>>();
  const auto allocate = [held](int64_t bytes) { return static_cast<void*>(held->emplace_back(bytes).data); };
  return {op, 7, nullptr, allocate, {}};
}

extern "C" bool intact() {
  return std::all_of(results.begin(), results.end(), [](const auto& result) { return result.intact(); });
}
