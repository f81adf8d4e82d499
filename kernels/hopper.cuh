// What Hopper alone has: barriers in shared memory, copies by TMA, products of a warpgroup. A function for each instruction of sm_90a, here
// and in tests/kernels/cuda_emulator.h.
#pragma once

#include "device.cuh"

// sm_90a alone has these instructions; for other architectures the kernels are empty and `supports` keeps callers away.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(CLIPFAST_EMULATED)
#define CLIPFAST_HOPPER 1
#else
#define CLIPFAST_HOPPER 0
#endif

namespace clipfast {

#ifndef CLIPFAST_EMULATED
__device__ inline void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
template <int count> __device__ inline void shrink_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count)); }
template <int count> __device__ inline void grow_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count)); }
__device__ inline void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ inline void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// The same barrier in that CTA of the cluster. Without .cluster: a release to the cluster would be a fence of the whole GPU, and what
// these barriers guard is read and written by wgmma and TMA alone.
__device__ inline void barrier_arrive(uint64_t* barrier, int cta) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(
          shared_address(barrier)),
      "r"(cta)
      : "memory");
}
__device__ inline void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ inline void barrier_arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
__device__ inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// Box (x, y) of the map to `to` and the same address in every CTA of the mask, where it counts towards the same barrier.
__device__ inline void load_box(const CUtensorMap* map, char* to, uint64_t* barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}
__device__ inline void load_box(const CUtensorMap* map, char* to, uint64_t* barrier, int x, int y, uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "h"(ctas)
      : "memory");
}
// Box (x, y, z) of a map of three dimensions.
__device__ inline void load_box_3d(const CUtensorMap* map, char* to, uint64_t* barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}
__device__ inline void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending> __device__ inline void mma_wait(float (&d)[128]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
  if constexpr (pending == 0)
#pragma unroll
    for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(d[i])::"memory");  // no use of d moves up to before the wait
}
template <int pending> __device__ inline void mma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory"); }
// What makes registers and what uses them stay on their sides of this: before a fence, behind a wait.
template <int rows> __device__ inline void pin(float (&x)[rows][4]) {
#pragma unroll
  for (int i = 0; i < 4 * rows; ++i) asm volatile("" : "+f"(x[i / 4][i % 4])::"memory");
}
template <int rows> __device__ inline void pin(uint32_t (&x)[rows][4]) {
#pragma unroll
  for (int i = 0; i < 4 * rows; ++i) asm volatile("" : "+r"(x[i / 4][i % 4])::"memory");
}
#define CLIPFAST_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define CLIPFAST_D16(i) CLIPFAST_D4(i), CLIPFAST_D4(i + 4), CLIPFAST_D4(i + 8), CLIPFAST_D4(i + 12)
#define CLIPFAST_MMA(type)                                                                                                     \
  asm volatile(                                                                                                                \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\nwgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {"             \
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,"   \
      "%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,"   \
      "%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,"    \
      "%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, %128, %129, p, 1, 1, 0, 0;\n}"                       \
      : CLIPFAST_D16(0), CLIPFAST_D16(16), CLIPFAST_D16(32), CLIPFAST_D16(48), CLIPFAST_D16(64), CLIPFAST_D16(80),             \
        CLIPFAST_D16(96), CLIPFAST_D16(112)                                                                                    \
      : "l"(a), "l"(b), "r"(add))
// d = a · bᵀ (+ d), 64 × 256 of depth 16, both operands in shared memory with the depth side by side: d[4·b + 2·h + e] is row
// 16·warp + lane / 4 + 8·h and column 8·b + 2·(lane % 4) + e.
template <class T> __device__ inline void mma(float (&d)[128], uint64_t a, uint64_t b, int add) {
  if constexpr (std::is_same_v<T, __half>)
    CLIPFAST_MMA("f16");
  else
    CLIPFAST_MMA("bf16");
}
#define CLIPFAST_ROW(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define CLIPFAST_MMA_NARROW(type, turned)                                                                                      \
  asm volatile(                                                                                                                \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {"               \
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, " \
      "{%32,%33,%34,%35}, %36, p, 1, 1, " turned ";\n}"                                                                        \
      : CLIPFAST_ROW(0), CLIPFAST_ROW(1), CLIPFAST_ROW(2), CLIPFAST_ROW(3), CLIPFAST_ROW(4), CLIPFAST_ROW(5), CLIPFAST_ROW(6), \
        CLIPFAST_ROW(7)                                                                                                        \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))
// d = a · bᵀ (+ d), or a · b: 64 × 64 of depth 16. a as mma_sync has it, 16 rows a warp; b 64 rows in shared memory with the depth side by
// side, or 16 rows of 64 columns. d[n][2·h + e] is row lane / 4 + 8·h of the warp's and column 8·n + 2·(lane % 4) + e.
template <class T> __device__ inline void mma_transposed(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, int add) {
  if constexpr (std::is_same_v<T, __half>)
    CLIPFAST_MMA_NARROW("f16", "0");
  else
    CLIPFAST_MMA_NARROW("bf16", "0");
}
template <class T> __device__ inline void mma(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, int add) {
  if constexpr (std::is_same_v<T, __half>)
    CLIPFAST_MMA_NARROW("f16", "1");
  else
    CLIPFAST_MMA_NARROW("bf16", "1");
}

// The driver's function, found at run time, so that the library loads where there is no driver.
inline auto tensor_map_encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  check("TMA", cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
#else
  check("TMA", cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result));
#endif
  if (!found) throw std::runtime_error("TMA on CUDA: this driver lacks cuTensorMapEncodeTiled; expected one for CUDA 12 or later");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}
#endif

// PTX ISA, matrix descriptor: rows of 128 bytes, swizzled (layout 1), 1,024 bytes from eight to the next eight, whether the depth runs
// along the rows or across them.
__device__ inline uint64_t descriptor(const char* p) {
  return (shared_address(p) & 0x3ffff) >> 4 | 1ull << 16 | 1024ull >> 4 << 32 | 1ull << 62;
}

// Boxes of `rows` rows of 64 elements. size, pitch: in elements, from the innermost dimension on.
template <class T, int rank>
CUtensorMap tensor_map(const T* data, const int64_t (&size)[rank], const int64_t (&pitch)[rank - 1], int rows) {
  static const auto encode = tensor_map_encoder();
  CUtensorMap map;
  cuuint64_t sizes[rank], bytes[rank];
  cuuint32_t box[rank] = {64, static_cast<cuuint32_t>(rows)}, step[rank];
  for (int i = 0; i < rank; ++i) {
    sizes[i] = size[i], box[i] = i < 2 ? box[i] : 1, step[i] = 1;
    if (i + 1 < rank) bytes[i] = pitch[i] * sizeof(T);
  }
  const auto type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result = encode(
      &map, type, rank, const_cast<T*>(data), sizes, bytes, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);  // beyond the sizes: zeros
  if (result != CUDA_SUCCESS) throw std::runtime_error("TMA on CUDA: cuTensorMapEncodeTiled failed: " + std::to_string(result));
  return map;
}

}  // namespace clipfast
