// Helpers of the CUDA kernels: types, launches, instructions, the vendor's matrix product. What Hopper alone has is in hopper.cuh.
#pragma once

#ifdef CLIPFAST_EMULATED  // tests/kernels: the same kernels on the host, with or without what torch calls
#include "cuda_emulator.h"
#else
#define CLIPFAST_TORCH
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace clipfast {

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T> __device__ T narrow(float x);
template <> __device__ inline float narrow<float>(float x) { return x; }
template <> __device__ inline __half narrow<__half>(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

constexpr float kLog2E = 1.44269504f;
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T> struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

// Over the four threads that share a row of a tensor core's result.
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// A launch error belongs to this call, not to whoever asks next.
inline void check(const char* op, cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(op) + " on CUDA: " + cudaGetErrorString(status));
}

// What the host side of a kernel needs to know of the call that it serves.
struct Call {
  const char* op;
  int sms;
  cudaStream_t stream;
  std::function<void*(int64_t bytes)> allocate;  // device memory until the call ends, aligned to 16 bytes
  std::function<void*()> blas;                   // torch's cuBLAS handle, set to the stream
  int generation = 9;                            // of the GPU: its compute capability's first number
};

struct Shape {
  int64_t ctas;
  int threads, cluster = 1, shared = 0;
};

#ifdef CLIPFAST_EMULATED
template <class... P, class... A> void launch(const Call&, void (*kernel)(P...), Shape shape, A&&... given) {
  emulated::run(shape.ctas, shape.threads, shape.cluster, shape.shared, [&] { kernel(given...); });
}
#else
template <class... P, class... A> void launch(const Call& call, void (*kernel)(P...), Shape shape, A&&... given) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.ctas));
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared;
  config.stream = call.stream;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  if (shape.shared) check(call.op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared));
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, std::forward<A>(given)...);
  if (status != cudaSuccess) cudaGetLastError();
  check(call.op, status);
}

// ---- a function for each instruction, here and in tests/kernels/cuda_emulator.h ----
__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}
__device__ inline void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline void arrive_threads(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline float exp2_fast(float x) {  // 2 ulp; below 2⁻¹²⁶ zero
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float reciprocal(float x) {  // 1 ulp
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <class T> __device__ inline uint32_t pack(float low, float high) {  // rounded to nearest
  uint32_t both;
  if constexpr (std::is_same_v<T, __half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
template <class T> __device__ inline void unpack(uint32_t both, float& low, float& high) {
  if constexpr (std::is_same_v<T, __half>) {
    const float2 wide = __half22float2(*reinterpret_cast<const __half2*>(&both));
    low = wide.x, high = wide.y;
  } else {
    low = __uint_as_float(both << 16), high = __uint_as_float(both & 0xffff0000u);
  }
}
__device__ inline float float_of(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint32_t bits_of(float x) { return __float_as_uint(x); }
template <class T> __device__ inline T* aligned_to_16(T* p) { return p; }
// 16 bytes of shared memory from global memory past L1: `bytes` of them, the rest zeros. Both addresses are aligned to 16 bytes.
__device__ inline void copy_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending> __device__ inline void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }
// Four matrices of 8 × 8: lanes 8·i to 8·i + 7 give the rows of the i-th, 16 aligned bytes each, and of it r[i] has row lane / 4, columns
// 2·(lane % 4) and the next; transposed, those two rows of column lane / 4.
__device__ inline void load_matrices(uint32_t (&r)[4], const char* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const char* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
#define CLIPFAST_MMA_SYNC(type)                                                                                                    \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
// d += a · b by a warp, 16 × 8 of depth 16. With g = lane / 4 and t = 2·(lane % 4), each register two neighbours of 16 bit: a[i] is row
// g + 8·(i % 2), columns t + 8·(i / 2); b0 and b1 are column g, rows t and t + 8; d[i] is row g + 8·(i / 2), column t + i % 2.
template <class T> __device__ inline void mma_sync(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>)
    CLIPFAST_MMA_SYNC("f16");
  else
    CLIPFAST_MMA_SYNC("bf16");
}
#endif

// ---- vectors ----
// Elements in whole registers, which the compiler would take apart: `words` are read and written 16 bytes at a time.
template <class T, int count> struct alignas(16) Packed {
  static constexpr int kWords = count * sizeof(T) / 4;
  uint32_t words[kWords];

  Packed() = default;
  // Rounded to nearest
  __device__ explicit Packed(const float (&x)[count]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      if constexpr (sizeof(T) == 2)
        words[i] = pack<T>(x[2 * i], x[2 * i + 1]);
      else
        words[i] = bits_of(x[i]);
  }
  __device__ void store(T* to) const { *reinterpret_cast<Packed*>(aligned_to_16(to)) = *this; }

  __device__ void widen(float (&to)[count]) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      if constexpr (sizeof(T) == 2)
        unpack<T>(words[i], to[2 * i], to[2 * i + 1]);
      else
        to[i] = float_of(words[i]);
  }
  __device__ void turn(uint32_t bits) {
#pragma unroll
    for (uint32_t& word : words) word ^= bits;
  }
};
template <int count, class T> __device__ inline Packed<T, count> load_packed(const T* from) {
  return *reinterpret_cast<const Packed<T, count>*>(aligned_to_16(from));
}
}  // namespace clipfast

// Two functions of the cuBLAS that torch has loaded (the C interface of CUDA 11 to 13; enumerations are int). Not linked: the symbols
// are found when the library loads, as those of libtorch_cuda are, and are null where there is none.
extern "C" {
__attribute__((weak)) int cublasSetPointerMode_v2(void* handle, int mode);
__attribute__((weak)) int cublasGemmEx(
    void* handle, int turn_a, int turn_b, int m, int n, int k, const void* alpha, const void* a, int type_a, int lda, const void* b,
    int type_b, int ldb, const void* beta, void* c, int type_c, int ldc, int compute, int algorithm);
}

namespace clipfast {

// c [rows, columns] = alpha · a · b + beta · c in fp32, alpha and beta in device memory; a is [rows, depth] with rows of `pitch`, or
// `turned` [depth, rows]; b [depth, columns] and c are contiguous. cuBLAS counts columns first, so it is asked for cᵀ = bᵀ · aᵀ.
template <class T>
void multiply(
    const Call& call, const T* a, int64_t pitch, bool turned, const T* b, float* c, int64_t rows, int64_t columns, int64_t depth,
    const float* alpha, const float* beta) {
  constexpr int kHostPointers = 0, kDevicePointers = 1, kCompute32F = 68, kDefault = -1;  // of cublas_api.h
  const int type = std::is_same_v<T, __half> ? CUDA_R_16F : CUDA_R_16BF, width = static_cast<int>(columns);
  void* handle = call.blas();
  int status = cublasSetPointerMode_v2(handle, kDevicePointers);
  if (status == 0) {
    status = cublasGemmEx(
        handle, 0, turned, width, static_cast<int>(rows), static_cast<int>(depth), alpha, b, type, width, a, type,
        static_cast<int>(pitch), beta, c, CUDA_R_32F, width, kCompute32F, kDefault);
    cublasSetPointerMode_v2(handle, kHostPointers);
  }
  if (status != 0) throw std::runtime_error(std::string(call.op) + " on CUDA: cuBLAS failed with status " + std::to_string(status));
}

}  // namespace clipfast

#ifdef CLIPFAST_TORCH
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <memory>
#include <vector>

namespace clipfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T> T* data(const Tensor& t) { return static_cast<T*>(t.data_ptr()); }

// x itself where it is of this type, contiguous and starts at 16 bytes, else a copy that is.
inline Tensor vectors_of(const Tensor& x, ScalarType type) {
  const Tensor typed = contiguous(to(x, type));
  return reinterpret_cast<uintptr_t>(typed.data_ptr()) % 16 ? clone(typed) : typed;
}

#ifdef CLIPFAST_EMULATED
#include "cuda_emulator_torch.h"
#else
#define CLIPFAST_DEVICE CUDA
inline Tensor fresh(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  return new_empty(like, sizes, type);
}

// x's device is the current one.
struct Guard {
  torch::stable::accelerator::DeviceGuard guard;
  explicit Guard(const Tensor& x) : guard(x.get_device_index()) {}
};

inline cudaStream_t stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// A call on x's device, which must be the current one.
inline Call call_on(const char* op, const Tensor& x) {
  int sms = 0, generation = 0;
  check(op, cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, x.get_device_index()));
  check(op, cudaDeviceGetAttribute(&generation, cudaDevAttrComputeCapabilityMajor, x.get_device_index()));
  const auto held = std::make_shared<std::vector<Tensor>>();
  const auto allocate = [x, held](int64_t bytes) {
    return held->emplace_back(new_empty(x, {bytes}, ScalarType::Byte)).data_ptr();
  };
  const auto blas = [] {
    if (!cublasGemmEx || !cublasSetPointerMode_v2) throw std::runtime_error("products on CUDA: expected torch to have loaded cuBLAS");
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
    return handle;
  };
  return {op, sms, stream_of(x), allocate, blas, generation};
}
#endif

}  // namespace clipfast
#endif
