// Sweeps over the similarity matrix S = image · textᵀ for Hopper (sm_90a), tile by tile, S never in memory: what the contrastive and
// the sigmoid loss share, and an MLP uses. One kernel, in which an `Epilogue` of the loss takes each tile from the registers.
//
// A CTA makes 128 × 256 of S at a time: one thread loads by TMA through a ring of four stages of depth 64, two warpgroups multiply,
// 64 × 256 each (128 registers a thread), and then take exponentials. What bounds a tile, in cycles of an SM:
//   tensor cores  16·D at 2,048 FMA a cycle (D = 512: 8,192; 768: 12,288)
//   L2            (128 + 256)·2·D bytes are 48 for a cycle of the tensor cores, and about 30 come (7 TB/s): so CTAs work in pairs
//                 on the same columns, each loading half of the text for both (multicast), 32 a cycle
//   exponentials  2,048 for one an element, 16 a cycle, and nearly as many for the rest of the epilogue
// The last would add to the first; therefore the second warpgroup starts two steps late and stays so: one multiplies while the other
// is at its exponentials. A model of the ring with L2 at 32 bytes a cycle has the tensor cores busy 0.87 of the time at D = 512 and
// 0.91 at 768 (0.79 and 0.85 without the lag, 0.66 without pairs); at 0.75, 740 TFLOP/s, an H100 runs out of power.
//
// Gradients: G is written in 16 bit, block by block, and multiplied by torch's cuBLAS with sums in fp32. On 132 SMs at D = 768 a block is
// 16,896 × 5,632, 0.19 GB: an element takes 3·2·D FLOP and 7.5 bytes, of G and of what it adds to both gradients, 5.8 and 1.7 ps, so HBM
// keeps up behind the products. Its edges are what 132 SMs share evenly: the sweep's clusters take 256 rows each, and the products
// tiles of 128 × 256, one and three waves of them.
#pragma once

#include "hopper.cuh"

#include <algorithm>

namespace clipfast {

constexpr int kRows = 128, kColumns = 256, kDepth = 64;  // of a tile; 64 elements are the 128 bytes of a swizzled row
constexpr int kStages = 4;                               // 48 KB each
constexpr int kCluster = 2;                              // CTAs that share their columns
constexpr int kThreads = 384;                            // a warpgroup that loads, two that multiply
constexpr int kLag = 2;                                  // steps by which the second of these starts later
constexpr int kScratch = 2048;                           // floats for the epilogue of a warpgroup
constexpr int kRowBytes = 2 * kDepth, kImageBytes = kRows * kRowBytes, kTextBytes = kColumns * kRowBytes;

// image: [n, D], text: [N, D], contiguous and aligned to 16 bytes, as are rows; row i has its pair in column i + offset.
template <class T> struct Problem {
  const T *image, *text;
  int64_t n, N, D;
  const float* scale;
  int64_t offset;
};

// Cluster c takes the row blocks c % slots, + slots, .. against part c / slots of the columns.
struct Plan {
  int row_blocks, tiles, steps;  // of kCluster · kRows rows, kColumns columns, kDepth
  int slots, parts;
};

// The shortest work for any cluster, with the fewest slots, as each has memory for the statistics of columns; but eight slots, which
// read the text together: it comes from HBM once for 8 · 256 rows, 0.34 TB/s at 700 TFLOP/s.
inline Plan make_plan(int64_t rows, int64_t columns, int64_t depth, int sms) {
  Plan plan = {static_cast<int>(divide_up(rows, kCluster * kRows)), static_cast<int>(divide_up(columns, kColumns)),
               static_cast<int>(divide_up(depth, kDepth)), 1, 1};
  const int clusters = std::max(1, sms / kCluster), most = std::min(clusters, plan.row_blocks);
  int64_t shortest = INT64_MAX;
  for (int slots = std::min(8, most); slots <= most; ++slots) {
    const int parts = std::min(clusters / slots, plan.tiles);
    const int64_t length = divide_up(plan.row_blocks, slots) * divide_up(plan.tiles, parts);
    if (length < shortest) shortest = length, plan.slots = slots, plan.parts = parts;
  }
  return plan;
}

// ---- the sweep ----

// A thread of a warpgroup that multiplies.
struct Seat {
  int group, warp, lane, rank, slot, part;
  // Its first row of a block, of which it also has the one eight below; the first row of its warp is lane / 4 above.
  __device__ int row(int block) const { return (block * kCluster + rank) * kRows + 64 * group + 16 * warp + lane / 4; }
  __device__ int thread() const { return 32 * warp + lane; }
  __device__ void sync_group() const { sync_threads(2 + group, 128); }
};

// Where in the tile from `column` on the row has its pair, in -8 .. kColumns - 1 (eight below is the thread's other row's); kColumns
// where it is elsewhere.
__device__ inline int pair_in_tile(int row, int64_t offset, int column) {
  const int64_t pair = row + offset - column;
  return pair >= -8 && pair < kColumns ? static_cast<int>(pair) : kColumns;
}

// x: a lane's 16 of 64 columns, over 2 rows -> x[0], x[1]: of its eight pairs that of number lane / 4, over the warp's 16 rows. Each
// exchange halves the columns: 14 shuffles where a reduction in place takes 48.
template <int half = 8> __device__ inline void spread(float (&x)[16], int lane) {
  const bool upper = lane & 2 * half;
#pragma unroll
  for (int i = 0; i < half; ++i) {
    const float give = upper ? x[i] : x[i + half], keep = upper ? x[i + half] : x[i];
    x[i] = keep + __shfl_xor_sync(~0u, give, 2 * half);
  }
  if constexpr (half > 2) spread<half / 2>(x, lane);
}

struct alignas(1024) Shared {
  char image[kStages][kImageBytes], text[kStages][kTextBytes];
  float scratch[2][kScratch];
  uint64_t full[kStages], empty[kStages];
};

struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    phase ^= 1;
  }
};

template <class T, class Epilogue>
__global__ void __launch_bounds__(kThreads, 1) sweep_kernel(
    const __grid_constant__ CUtensorMap image, const __grid_constant__ CUtensorMap text, const Plan plan,
    const __grid_constant__ typename Epilogue::Arguments given) {
#if CLIPFAST_HOPPER
  char* memory = dynamic_shared();
  Shared& shared = *reinterpret_cast<Shared*>(memory + (-shared_address(memory) & 1023u));
  const int rank = blockIdx.x % kCluster, cluster = blockIdx.x / kCluster;
  const int slot = cluster % plan.slots, part = cluster / plan.slots;
  const int first = static_cast<int64_t>(plan.tiles) * part / plan.parts;
  const int last = static_cast<int64_t>(plan.tiles) * (part + 1) / plan.parts;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&shared.full[i], 1);
      barrier_init(&shared.empty[i], 8 * kCluster);  // every warp that multiplies, here and in the other CTA
    }
    fence_barrier_init();
  }
  sync_cluster();
  Ring ring;
  if (threadIdx.x < 128) {
    shrink_registers<40>();
    if (threadIdx.x == 0) {
      constexpr int share = kColumns / kCluster;  // of the text, which this CTA loads for all
      for (int block = slot; block < plan.row_blocks; block += plan.slots)
        for (int tile = first; tile < last; ++tile)
          for (int k = 0; k < plan.steps; ++k, ring.advance()) {
            uint64_t* full = &shared.full[ring.stage];
            barrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
            barrier_arrive_expecting(full, kImageBytes + kTextBytes);
            load_box(&image, shared.image[ring.stage], full, k * kDepth, (block * kCluster + rank) * kRows);
            for (int row = rank * share; row < (rank + 1) * share; row += kRows)
              load_box(&text, shared.text[ring.stage] + row * kRowBytes, full, k * kDepth, tile * kColumns + row,
                       (1 << kCluster) - 1);
          }
    }
    __syncwarp();
  } else {
    grow_registers<232>();
    const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32 - 4, 0);  // known to be uniform
    const Seat seat{warp / 4, warp % 4, static_cast<int>(threadIdx.x) % 32, rank, slot, part};
    const auto release = [&](int stage) {
      if (seat.lane < kCluster) barrier_arrive(&shared.empty[stage], seat.lane);
    };
    Epilogue epilogue(given, seat, shared.scratch[seat.group]);
    bool leads = seat.group == 0;
    if (!leads) sync_threads(1, 256);  // the lag
    float s[128];
    for (int block = slot; block < plan.row_blocks; block += plan.slots) {
      epilogue.start(block);
      for (int tile = first; tile < last; ++tile) {
        epilogue.fetch(tile * kColumns);
        int before = 0;
        for (int k = 0; k < plan.steps; ++k, ring.advance()) {
          barrier_wait(&shared.full[ring.stage], ring.phase);
          const uint64_t a = descriptor(shared.image[ring.stage] + 64 * seat.group * kRowBytes);
          const uint64_t b = descriptor(shared.text[ring.stage]);
          mma_fence();
#pragma unroll
          for (int i = 0; i < kDepth / 16; ++i) mma<T>(s, a + 2 * i, b + 2 * i, k + i > 0);  // 32 bytes on, in units of 16
          mma_commit();
          mma_wait<1>(s);  // the step before is done
          if (k > 0) release(before);
          before = ring.stage;
          if (leads && k + 1 == min(kLag, plan.steps)) {
            arrive_threads(1, 256);
            leads = false;
          }
        }
        mma_wait<0>(s);
        release(before);
        epilogue.tile(s, tile * kColumns);
      }
      epilogue.finish();
    }
  }
  sync_cluster();  // nobody leaves while the other may still signal or load here
#endif
}

// Over `text_rows` rows of the problem's text, of which N are columns of S.
template <class T, class Epilogue>
void sweep(const Call& call, const Problem<T>& p, int64_t text_rows, const Plan& plan, const typename Epilogue::Arguments& given) {
  const Shape shape{int64_t{kCluster} * plan.slots * plan.parts, kThreads, kCluster, sizeof(Shared) + 1024};
  launch(call, sweep_kernel<T, Epilogue>, shape, tensor_map(p.image, {p.D, p.n}, {p.D}, kRows),
         tensor_map(p.text, {p.D, text_rows}, {p.D}, kRows), plan, given);
}

// ---- gradients ----

// G's columns of a thread lie side by side, 8 of 32, for stores of 16 bytes: column 8·b + 2·t + e of the tensor cores' 32 is column
// 8·t + 2·b + e of G (b, t < 4, e < 2), as the rows of the text are arranged so.
__host__ __device__ inline int arranged(int i) { return (i & ~31) + (i >> 1 & 3) * 8 + (i >> 3 & 3) * 2 + (i & 1); }

// text: [rows, width], out: [rows up to a multiple of 32, width], in vectors; the rows added are zero
template <class T> static __global__ void arrange_kernel(const Vector<T>* text, Vector<T>* out, int rows, int width) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= static_cast<int64_t>(rows + 31) / 32 * 32 * width) return;
  const int from = arranged(static_cast<int>(at / width));
  out[at] = from < rows ? text[static_cast<int64_t>(from) * width + at % width] : Vector<T>{};
}

// A thread's eight columns of 32: from shared memory, and into G.
__device__ inline void load(float (&x)[8], const float* from) {
  reinterpret_cast<float4&>(x[0]) = reinterpret_cast<const float4*>(from)[0];
  reinterpret_cast<float4&>(x[4]) = reinterpret_cast<const float4*>(from)[1];
}
template <class T> __device__ inline void store(T* to, const float (&x)[8]) {
  Vector<T> v;
#pragma unroll
  for (int i = 0; i < 8; ++i) v.at[i] = narrow<T>(x[i]);
  *reinterpret_cast<Vector<T>*>(to) = v;
}

struct Factors {
  float unit, zero = 0.0f, one = 1.0f;  // for cuBLAS: G is stored in units of the first
};

// Of G, what is in memory at a time.
struct Block {
  int64_t rows, columns;
};

// One edge is larger where the other, n or N, is less.
inline Block make_block(int64_t n, int64_t N, int64_t D, int sms) {
  constexpr int64_t kHeight = kCluster * kRows;
  const int64_t height = std::max(1, sms / kCluster) * kHeight, wave = sms / std::max<int64_t>(2, divide_up(D, 256)) * 128;
  const int64_t width = std::max<int64_t>(wave / kColumns * kColumns, kColumns), area = height * width;
  const int64_t rows = std::min(n, std::max(height, area / std::min(N, width) / kHeight * kHeight));
  return {rows, std::min(N, std::max(width, area / rows / kColumns * kColumns))};
}

// image_grad = G · text, text_grad = Gᵀ · image, either of them null where it is not wanted. fill(block, text_rows, row, column, G,
// pitch) writes the G of a block from `row` and `column` on, whose text is arranged and padded; it may write whole tiles.
template <class T, class Fill>
void gradients(
    const Call& call, const Problem<T>& p, const Factors* factors, float* image_grad, float* text_grad, const Fill& fill) {
  constexpr int64_t kHeight = kCluster * kRows;
  const auto [height, width] = make_block(p.n, p.N, p.D, call.sms);
  const int64_t pitch = divide_up(width, kColumns) * kColumns, vectors = p.D / Vector<T>::kSize;
  T* const G = static_cast<T*>(call.allocate(divide_up(height, kHeight) * kHeight * pitch * sizeof(T)));
  T* const ordered = static_cast<T*>(call.allocate(divide_up(width, 32) * 32 * p.D * sizeof(T)));
  for (int64_t column = 0; column < p.N; column += width) {
    const int64_t columns = std::min(width, p.N - column), text_rows = divide_up(columns, 32) * 32;
    const T* text = p.text + column * p.D;
    launch(call, arrange_kernel<T>, {divide_up(text_rows * vectors, 256), 256}, reinterpret_cast<const Vector<T>*>(text),
           reinterpret_cast<Vector<T>*>(ordered), static_cast<int>(columns), static_cast<int>(vectors));
    for (int64_t row = 0; row < p.n; row += height) {
      const int64_t rows = std::min(height, p.n - row);
      const T* image = p.image + row * p.D;
      fill(Problem<T>{image, ordered, rows, columns, p.D, p.scale, p.offset + row - column}, text_rows, row, column, G, pitch);
      if (image_grad)
        multiply(call, G, pitch, false, text, image_grad + row * p.D, rows, p.D, columns, &factors->unit,
                 column ? &factors->one : &factors->zero);
      if (text_grad)
        multiply(call, G, pitch, true, image, text_grad + column * p.D, columns, p.D, rows, &factors->unit,
                 row ? &factors->one : &factors->zero);
    }
  }
}

// ---- the tail that knows torch ----
#ifdef CLIPFAST_TORCH

inline float* wanted(const Tensor& gradient) { return gradient.numel() ? data<float>(gradient) : nullptr; }

struct Inputs {
  torch::stable::accelerator::DeviceGuard guard;
  Call call;
  Tensor image, text, scale;
  int64_t n, N, D, offset;

  Inputs(const char* op, const Tensor& image_, const Tensor& text_, const Tensor& scale_, int64_t offset_)
      : guard(image_.get_device_index()), call(call_on(op, image_)), image(vectors_of(image_, image_.scalar_type())),
        text(vectors_of(text_, image_.scalar_type())),
        scale(to(scale_, ScalarType::Float)), n(image.size(0)), N(text.size(0)), D(image.size(1)),
        offset(std::min(std::max(offset_, -n), N)) {}  // beyond these no row has its pair, and sums cannot overflow

  Tensor floats(int64_t length) const { return new_empty(image, {length}, ScalarType::Float); }
  Tensor gradient(int64_t rows) const { return new_empty(image, {rows, D}, ScalarType::Float); }

  // Calls f with the problem in the type of the features.
  template <class F> void run(const F& f) const {
    const auto with = [&](auto t) {
      using T = decltype(t);
      f(Problem<T>{data<T>(image), data<T>(text), n, N, D, data<float>(scale), offset});
    };
    if (image.scalar_type() == ScalarType::Half) return with(__half{});
    if (image.scalar_type() == ScalarType::BFloat16) return with(__nv_bfloat16{});
    throw std::runtime_error(std::string(call.op) + " on CUDA: expected float16 or bfloat16");
  }
};
#endif

}  // namespace clipfast
