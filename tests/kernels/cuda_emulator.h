// A host emulator of what the Hopper kernels use (kernels/device.cuh), in place of CUDA's headers when CLIPFAST_EMULATED is defined. Every
// CUDA thread is a fibre, a cluster of CTAs runs at a time, warps take turns in random order and some are held back; what is asynchronous
// happens as late as it may (products and cp.async at the wait, other copies some turns after their issue, the destination spoilt at once). So a missing
// wait or fence, a wrong phase or layout, a stage given back early changes the result or is an error. The rules are those of the PTX ISA
// (9.0), named where they stand. Not emulated: time, and the order in which proxies see each other's writes.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __shared__ static  // one CTA at a time where it is used
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define threadIdx (*emulated::self)
#define blockIdx (*emulated::self->cta)
#define blockDim (emulated::machine)
#define gridDim (emulated::machine.grid)

// ---- types and names of CUDA ----
using std::max, std::min;
using cudaError_t = int; using cudaStream_t = void*; using CUresult = int; using cuuint64_t = uint64_t; using cuuint32_t = uint32_t;
constexpr int cudaSuccess = 0, CUDA_SUCCESS = 0, CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14;
constexpr int CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9, CU_TENSOR_MAP_INTERLEAVE_NONE = 0;
constexpr int CU_TENSOR_MAP_SWIZZLE_128B = 3, CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0;
struct alignas(64) CUtensorMap { const char* data; int64_t width, height, depth, pitch, step; int box_width, box_height; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct __half { _Float16 value; };
struct __nv_bfloat16 { uint16_t bits; };
inline const char* cudaGetErrorString(int) { return "error"; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline float __bfloat162float(__nv_bfloat16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  return {static_cast<uint16_t>(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
namespace emulated {
inline void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string("emulator: ") + what);
}
// Memory filled with NaN, with a page behind its end that faults and a watch on what lies before its start.
struct Guarded {
  size_t size, length;
  char *base, *data;
  explicit Guarded(size_t size) : size(size), length((size + 32) / 4096 * 4096 + 4096) {
    base = static_cast<char*>(mmap(nullptr, length + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base + length, 4096, PROT_NONE);
    data = base + (length - size) / 16 * 16;
    std::memset(base, 0xff, length);
  }
  ~Guarded() { munmap(base, length + 4096); }
  Guarded(const Guarded&) = delete;
  bool intact() const {
    const auto untouched = [](char c) { return c == '\xff'; };
    return std::all_of(base, data, untouched) && std::all_of(data + size, base + length, untouched);
  }
};
// ---- the machine ----
struct Barrier { int count, pending, bytes; uint32_t phase; };      // mbarrier
struct Named { int threads, arrived; uint64_t generation; };        // bar, barrier.cluster
struct Product {  // wgmma.mma_async of a warp
  uint64_t a, b;
  int add, columns;
  bool half, turned;  // b with its columns, not the depth, side by side
  float* d[32];
  const uint32_t* left[32];  // a where it is in registers
};
struct Warp {
  int id, arrived[2], kind[2];  // of a meeting of its lanes, on two sides in turn
  uint64_t values[2][32], met[2], executed;
  std::deque<Product> products;
  std::vector<uint64_t> groups;  // how many products each commit included
  uint32_t loaded[2][32][4];     // what a ldmatrix gave, on the two sides
};
struct AsyncCopy { char* to; const char* from; int bytes; };  // cp.async, of 16 bytes
struct Cta {
  unsigned x;
  int rank, alive;
  bool fenced;  // whether the initialisation of its mbarriers is
  std::unique_ptr<Guarded> memory;
  std::map<uint32_t, Barrier> barriers;
  std::map<uint32_t, const void*> unseen;  // 16 bytes of cp.async that their thread waited for, and no barrier since
  Named named[16];
  std::deque<Warp> warps;
  std::vector<Product> asked[8];  // of each warpgroup
};
struct Thread {
  static constexpr size_t kStack = 128 << 10;
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t context;
  unsigned x;
  Cta* cta;
  Warp* warp;
  bool (*ready)(const void*), done, fenced;  // `ready` of a thread that waits
  const void* state;
  int lane, registers;
  uint64_t meetings, issued, committed;
  std::deque<AsyncCopy> copies;   // not yet arrived
  std::deque<size_t> batches;     // how many of them each commit included
};
struct Copy { const CUtensorMap* map; std::vector<Cta*> to; uint32_t address, barrier; int x, y, z, delay; };  // cp.async.bulk.tensor
struct Machine {
  unsigned x;  // threads of a CTA
  struct { unsigned x; } grid;  // CTAs
  std::mt19937 random;
  std::deque<Thread> threads;
  std::deque<Cta> ctas;
  std::vector<Copy> copies;
  Named cluster;
  Warp* starved;
  std::string error;
  const std::function<void()>* body;
  ucontext_t scheduler;
};
inline Machine machine;
inline Thread* self;
constexpr uint32_t kSharedBase = 0x410;  // where dynamic shared memory starts: aligned to 16 bytes and no more
template <class F> void wait_until(const F& ready) {
  if (ready()) return;
  self->ready = [](const void* f) { return (*static_cast<const F*>(f))(); };
  self->state = &ready;
  swapcontext(&self->context, &machine.scheduler);
  self->ready = nullptr;
}
inline char* at(Cta& cta, uint32_t address, size_t size) {
  require(address >= kSharedBase && address + size <= kSharedBase + cta.memory->size, "address outside shared memory");
  return cta.memory->data + (address - kSharedBase);
}
// All lanes of a warp meet at one instruction (.sync.aligned) and see each other's values; `last` runs when all have come.
template <class F> const uint64_t* meet(int kind, uint64_t value, const F& last) {
  Warp& w = *self->warp;
  const uint64_t meeting = ++self->meetings;
  const int side = meeting % 2;  // nobody is two meetings ahead of another
  if (w.arrived[side] == 0) w.kind[side] = kind;
  require(w.kind[side] == kind, "the lanes of a warp are at different instructions");
  w.values[side][self->lane] = value;
  if (++w.arrived[side] == 32) w.arrived[side] = 0, last(), w.met[side] = meeting;
  wait_until([&] { return w.met[side] == meeting; });
  return w.values[side];
}
inline const uint64_t* meet(int kind, uint64_t value = 0) { return meet(kind, value, [] {}); }
inline void arrive_named(Named& b, int threads) {
  require(threads % 32 == 0 && (b.arrived == 0 || b.threads == threads), "a barrier with differing numbers of threads");
  b.threads = threads;
  if (++b.arrived < threads) return;
  b.arrived = 0, ++b.generation;
  // One that waited here gets no turn for a while, so that the others run as far ahead as they can.
  auto& warps = self->cta->warps;
  if (machine.random() % 4 == 0)
    machine.starved = &warps[std::min<size_t>(warps.size() - 1, self->warp->id / 4 * 4 + machine.random() % 4)];
}
// "cp.async.wait_group": what was copied is seen by the thread that waits, by others behind a barrier.
inline void show_copies() {
  std::erase_if(self->cta->unseen, [](const auto& copy) { return copy.second == self; });
}
inline void sync_named(Named& b, int threads) {
  show_copies();
  const uint64_t generation = b.generation;
  arrive_named(b, threads);
  wait_until([&] { return b.generation != generation; });
}
// "mbarrier": its phase ends when neither an arrival nor a byte is outstanding.
inline Barrier& barrier_at(Cta& cta, uint32_t address) {
  require(cta.alive > 0, "an mbarrier of a CTA that has ended");
  const auto found = cta.barriers.find(address);
  require(found != cta.barriers.end(), "an mbarrier not initialised");
  uint64_t mark;
  require(std::memcpy(&mark, at(cta, address, 8), 8) && mark == ~uint64_t{address}, "an mbarrier overwritten");
  return found->second;
}
inline void change(Cta& cta, uint32_t address, int arrivals, int bytes) {
  Barrier& b = barrier_at(cta, address);
  b.pending -= arrivals;
  b.bytes += bytes;
  require(b.pending >= 0, "more arrivals at an mbarrier than expected");
  require(std::abs(b.bytes) < 1 << 20, "the tx-count of an mbarrier out of range");
  if (b.pending == 0 && b.bytes == 0) ++b.phase, b.pending = b.count;
}
// "Tensors", tiled mode: zeros out of bounds; "Swizzling modes", 128 bytes: bits 4 to 6 of an address ^= bits 7 to 9.
inline uint32_t swizzle(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }
inline void deliver(const Copy& copy) {
  const CUtensorMap& map = *copy.map;
  for (Cta* cta : copy.to) {
    for (int r = 0; r < map.box_height; ++r)
      for (int c = 0; c < map.box_width; ++c) {
        const int64_t x = int64_t{copy.x} + c, y = int64_t{copy.y} + r;
        uint16_t element = 0;
        const bool inside = x >= 0 && x < map.width && y >= 0 && y < map.height && copy.z >= 0 && copy.z < map.depth;
        if (inside) std::memcpy(&element, map.data + copy.z * map.step + y * map.pitch + 2 * x, 2);
        std::memcpy(at(*cta, swizzle(copy.address + 2 * (r * map.box_width + c)), 2), &element, 2);
      }
    change(*cta, copy.barrier, 0, -2 * map.box_width * map.box_height);  // what is out of bounds counts too
  }
}
inline float value(uint16_t bits, bool half) {
  return half ? static_cast<float>(__builtin_bit_cast(_Float16, bits)) : __bfloat162float({bits});
}
// "Matrix Descriptor Format", "Strides", a swizzle of 128 bytes: rows of 128 bytes, eight to an atom, from atom to atom the stride byte
// offset; every field in units of 16 bytes. K-major: the depth, up to 64, along the rows; MN-major: across them.
inline float element(Cta& cta, uint64_t descriptor, int row, int column, bool half) {
  const auto field = [&](int from, int bits) { return static_cast<uint32_t>(descriptor >> from & ((1ull << bits) - 1)); };
  require(field(62, 2) == 1 && field(49, 3) == 0, "a descriptor of another layout than the swizzle of 128 bytes");
  const uint32_t address = 16 * field(0, 14) + row / 8 * 16 * field(32, 14) + row % 8 * 128 + 2 * column;
  uint16_t bits;
  std::memcpy(&bits, at(cta, swizzle(address), 2), 2);
  return value(bits, half);
}
// "mma.m16n8k16", "wgmma", fragments of 16 bit with g = lane / 4, t = lane % 4: element i of a has row g (i < 2, 4 <= i < 6) or g + 8 and
// column 2·t + i % 2, 8 more from i = 4 on.
template <class Of> void gather_left(float (&a)[16][16], bool half, const Of& of) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 8; ++i)
      a[lane / 4 + (i < 2 || (i >= 4 && i < 6) ? 0 : 8)][2 * (lane % 4) + i % 2 + (i < 4 ? 0 : 8)] =
          value(static_cast<uint16_t>(of(lane)[i / 2] >> i % 2 * 16), half);
}
// "wgmma.mma_async", m64nNk16: this warp's 16 rows. "Register fragments", D: register i of a lane has row lane / 4 + 8·(i / 2 % 2)
// and column 8·(i / 4) + 2·(lane % 4) + i % 2.
inline void execute(Cta& cta, const Warp& warp, const Product& p) {
  static float a[16][16], b[16][256], c[16][256];
  std::memset(c, 0, sizeof(c));
  if (p.left[0]) gather_left(a, p.half, [&](int lane) { return p.left[lane]; });
  for (int k = 0; k < 16; ++k) {
    for (int r = 0; r < 16 && !p.left[0]; ++r) a[r][k] = element(cta, p.a, 16 * (warp.id % 4) + r, k, p.half);
    for (int j = 0; j < p.columns; ++j) b[k][j] = p.turned ? element(cta, p.b, k, j, p.half) : element(cta, p.b, j, k, p.half);
  }
  for (int r = 0; r < 16; ++r)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < p.columns; ++j) c[r][j] += a[r][k] * b[k][j];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < p.columns / 2; ++i)
      p.d[lane][i] = (p.add ? p.d[lane][i] : 0.0f) + c[lane / 4 + 8 * (i / 2 % 2)][8 * (i / 4) + 2 * (lane % 4) + i % 2];
}
// ---- a launch ----
template <class F> std::string guarded(const F& call);
inline void fibre() {
  try {
    (*machine.body)();
    require(self->warp->products.empty(), "a thread ends before its products");
    require(self->copies.empty(), "a thread ends before its copies");
  } catch (const std::exception& e) {
    machine.error = e.what();
  }
  self->done = true, --self->cta->alive;
  swapcontext(&self->context, &machine.scheduler);
}
inline void run_cluster(unsigned first, int cluster, int threads, int shared) {
  Machine& m = machine;
  m.ctas.clear(), m.copies.clear(), m.error.clear(), m.cluster = {}, m.starved = nullptr;
  while (static_cast<int>(m.threads.size()) < cluster * threads) m.threads.emplace_back();
  for (int rank = 0; rank < cluster; ++rank) {
    Cta& cta = m.ctas.emplace_back();
    cta.x = first + rank, cta.rank = rank, cta.alive = threads, cta.memory = std::make_unique<Guarded>(shared);
    for (int i = 0; i < threads; ++i) {
      if (i % 32 == 0) cta.warps.emplace_back().id = i / 32;
      Thread& t = m.threads[rank * threads + i];
      t.x = i, t.cta = &cta, t.warp = &cta.warps.back(), t.lane = i % 32, t.ready = nullptr;
      t.registers = 65536 / threads / 8 * 8, t.done = t.fenced = false, t.meetings = t.issued = t.committed = 0;
      t.copies.clear(), t.batches.clear();
      getcontext(&t.context);
      t.context.uc_stack.ss_sp = t.stack.get(), t.context.uc_stack.ss_size = Thread::kStack;
      makecontext(&t.context, fibre, 0);
    }
  }
  if (m.random() % 2 == 0) m.starved = &m.ctas[m.random() % cluster].warps[m.random() % (threads / 32)];  // one comes late
  std::vector<int> order;
  for (int i = 0; i < cluster * threads / 32; ++i) order.push_back(i);
  for (bool left = true; left;) {
    left = false;
    bool moved = !m.copies.empty();
    std::shuffle(order.begin(), order.end(), m.random);
    if (m.random() % 64 == 0) m.starved = nullptr;
    for (const int i : order)
      for (int lane = 0; lane < 32; ++lane) {
        self = &m.threads[32 * i + lane];
        left |= !self->done;
        if (self->done || self->warp == m.starved || (self->ready && !self->ready(self->state))) continue;
        moved = true;
        swapcontext(&m.scheduler, &self->context);
        if (!m.error.empty()) throw std::runtime_error(m.error);
      }
    for (size_t i = m.copies.size(); i-- > 0;)
      if (--m.copies[i].delay < 0) deliver(m.copies[i]), m.copies.erase(m.copies.begin() + i);
    require(moved || m.starved || !left, "deadlock");
    if (!moved) m.starved = nullptr;
  }
  for (const Cta& cta : m.ctas) require(cta.memory->intact(), "a write outside shared memory");
}
inline void run(int64_t ctas, int threads, int cluster, int shared, const std::function<void()>& body) {
  require(ctas > 0 && ctas % cluster == 0 && threads % 32 == 0 && threads <= 1024 && shared <= 232448, "a launch out of range");
  machine.x = threads, machine.grid.x = ctas, machine.body = &body;
  const auto run_all = [&] {
    for (int64_t first = 0; first < ctas; first += cluster) run_cluster(first, cluster, threads, shared);
  };
#ifdef CLIPFAST_TORCH  // nobody outside catches a fault
  if (const std::string error = guarded(run_all); !error.empty()) throw std::runtime_error(error);
#else
  run_all();
#endif
}
// The error of this call, or nothing; an access outside a buffer is one.
inline sigjmp_buf outside;
template <class F> std::string guarded(const F& call) {
  static char stack[1 << 16];
  const stack_t alternative = {stack, 0, sizeof(stack)};
  sigaltstack(&alternative, nullptr);
  struct sigaction action = {}, before;
  action.sa_handler = [](int) { siglongjmp(outside, 1); };
  action.sa_flags = SA_ONSTACK;
  sigaction(SIGSEGV, &action, &before);
  std::string result = "emulator: access outside a buffer";
  try {
    if (sigsetjmp(outside, 1) == 0) call(), result.clear();
  } catch (const std::exception& e) {
    result = e.what();
  }
  sigaction(SIGSEGV, &before, nullptr);
  return result;
}
struct Memory {  // of a call to a kernel's host side: every array in pages of its own
  std::deque<Guarded> arrays;
  std::vector<std::pair<void*, const Guarded*>> results;

  void* space(int64_t bytes) { return arrays.emplace_back(bytes).data; }
  template <class T> const T* in(const void* from, int64_t count) {
    return static_cast<const T*>(std::memcpy(space(count * sizeof(T)), from, count * sizeof(T)));
  }
  template <class T> T* out(T* to, int64_t count) {
    if (!to) return nullptr;
    auto* from = static_cast<T*>(space(count * sizeof(T)));
    results.emplace_back(to, &arrays.back());
    return from;
  }
};
// The error of f(memory), or an empty text and the results where they belong.
template <class F> const char* run(int seed, const F& f) {
  static std::string message;
  machine.random.seed(seed);
  message = guarded([&] {
    Memory m;
    f(m);
    for (const auto& a : m.arrays) require(a.intact(), "write outside a buffer");
    for (const auto& [to, from] : m.results) std::memcpy(to, from->data, from->size);
  });
  return message.c_str();
}
}  // namespace emulated

// ---- CUDA's functions of a warp and a CTA ----
template <class V> V __shfl_sync(unsigned, V value, int from) {
  return __builtin_bit_cast(V, static_cast<uint32_t>(emulated::meet(1, __builtin_bit_cast(uint32_t, value))[from]));
}
template <class V> V __shfl_xor_sync(unsigned mask, V value, int lanes) { return __shfl_sync(mask, value, emulated::self->lane ^ lanes); }
inline bool __all_sync(unsigned, bool value) {
  const uint64_t* values = emulated::meet(3, value);
  return std::count(values, values + 32, 0u) == 0;
}
inline void __syncwarp() { emulated::show_copies(), emulated::meet(4); }
inline void __syncthreads() { emulated::sync_named(emulated::self->cta->named[0], emulated::machine.x); }

inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }

// ---- what stands for instructions in kernels/device.cuh ----
namespace clipfast {
using emulated::machine, emulated::meet, emulated::require, emulated::self;
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - self->cta->memory->data) + emulated::kSharedBase;
}
inline char* dynamic_shared() { return self->cta->memory->data; }
inline void sync_threads(int barrier, int threads) { emulated::sync_named(self->cta->named[barrier], threads); }
inline void arrive_threads(int barrier, int threads) { emulated::arrive_named(self->cta->named[barrier], threads); }
inline void sync_cluster() { meet(5), emulated::sync_named(machine.cluster, static_cast<int>(machine.ctas.size() * machine.x)); }
// "setmaxnreg": a multiple of 8 from 24 to 256; an increase waits until the 65,536 registers of the CTA allow it.
template <int count> void grow_registers() {
  require(count % 8 == 0 && count >= 24 && count <= 256, "setmaxnreg");
  emulated::wait_until([me = self] {
    int used = count - me->registers;
    for (const auto& t : machine.threads) used += t.cta == me->cta && !t.done ? t.registers : 0;
    return used <= 65536;
  });
  self->registers = count;
}
template <int count> void shrink_registers() { grow_registers<count>(); }
inline void barrier_init(uint64_t* barrier, int arrivals) {
  const uint32_t address = shared_address(barrier);
  require(address % 8 == 0 && arrivals > 0, "mbarrier.init");
  *barrier = ~uint64_t{address}, self->cta->barriers[address] = {arrivals, arrivals, 0, 0}, self->cta->fenced = false;
}
inline void fence_barrier_init() { self->cta->fenced = true; }
inline void barrier_arrive(uint64_t* barrier, int cta) {
  require(machine.ctas.at(cta).fenced, "the initialisation of an mbarrier is not fenced");
  emulated::change(machine.ctas[cta], shared_address(barrier), 1, 0);
}
inline void barrier_arrive(uint64_t* barrier) { barrier_arrive(barrier, self->cta->rank); }
inline void barrier_arrive_expecting(uint64_t* barrier, int bytes) { emulated::change(*self->cta, shared_address(barrier), 1, bytes); }
// "mbarrier.try_wait.parity": true once the phase of that parity has ended, which before the first is that of parity 1.
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  emulated::wait_until([parity, cta = self->cta, address = shared_address(barrier)] {
    return (emulated::barrier_at(*cta, address).phase & 1) != parity;
  });
}
// "cp.async.bulk.tensor": to the same address, and counted by the same barrier, in every CTA of the mask.
inline void load_box_3d(const CUtensorMap* map, char* to, uint64_t* barrier, int x, int y, int z, int ctas = 0) {
  emulated::Copy copy{map, {}, shared_address(to), shared_address(barrier), x, y, z, static_cast<int>(machine.random() % 6)};
  require(copy.address % 128 == 0, "the destination of a copy is not aligned to 128 bytes");
  const int bytes = 2 * map->box_width * map->box_height;
  for (emulated::Cta& cta : machine.ctas)
    if (ctas ? ctas >> cta.rank & 1 : &cta == self->cta) {
      require(cta.fenced, "the initialisation of an mbarrier is not fenced");
      std::memset(emulated::at(cta, copy.address, bytes), 0xff, bytes);
      copy.to.push_back(&cta);
    }
  machine.copies.push_back(copy);
}
inline void load_box(const CUtensorMap* map, char* to, uint64_t* barrier, int x, int y, int ctas = 0) {
  load_box_3d(map, to, barrier, x, y, 0, ctas);
}
// "wgmma.fence": before the first product, and again after the registers were free for use.
inline void mma_fence() { meet(6), self->fenced = true; }
// Operands in registers are read as late as the others are, so that a change before the wait changes the result.
inline void ask(const emulated::Product& product, float* d, const uint32_t* left) {
  require(self->fenced, "wgmma.mma_async before wgmma.fence");
  emulated::Warp& w = *self->warp;
  auto& asked = self->cta->asked[w.id / 4];
  const uint64_t index = self->issued++;
  if (index == asked.size()) asked.push_back(product);
  const emulated::Product& first = asked[index];
  require(
      first.a == product.a && first.b == product.b && first.add == product.add && first.turned == product.turned,
      "threads of a warpgroup ask for different products");
  for (const emulated::Copy& copy : machine.copies)
    for (const uint64_t operand : {product.a, product.b}) {
      const uint32_t at = 16 * static_cast<uint32_t>(operand & 0x3fff), bytes = 2 * copy.map->box_width * copy.map->box_height;
      const bool here = std::count(copy.to.begin(), copy.to.end(), self->cta) && at >= copy.address && at < copy.address + bytes;
      require(!here, "a product of what a copy has yet to bring");
    }
  if (index == w.executed + w.products.size()) w.products.push_back(product);
  emulated::Product& mine = w.products.at(index - w.executed);
  mine.d[self->lane] = d, mine.left[self->lane] = left;
}
template <class T> void mma(float (&d)[128], uint64_t a, uint64_t b, int add) {
  ask({a, b, add, 256, std::is_same_v<T, __half>, false, {}, {}}, d, nullptr);
}
template <class T> void mma_transposed(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, int add) {
  ask({0, b, add, 64, std::is_same_v<T, __half>, false, {}, {}}, d[0], a);
}
template <class T> void mma(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, int add) {
  ask({0, b, add, 64, std::is_same_v<T, __half>, true, {}, {}}, d[0], a);
}
template <class V> void pin(V&) {}
inline void mma_commit() {
  auto& groups = self->warp->groups;
  if (self->committed == groups.size()) groups.push_back(self->issued);
  require(groups[self->committed++] == self->issued, "lanes of a warp commit different products");
}
template <int pending> void mma_wait() {
  meet(7 + pending, 0, [cta = self->cta, &w = *self->warp] {
    const uint64_t until = w.groups.size() > pending ? w.groups[w.groups.size() - 1 - pending] : 0;
    for (; w.executed < until; ++w.executed, w.products.pop_front()) emulated::execute(*cta, w, w.products.front());
  });
  if (pending == 0) self->fenced = false;
}
template <int pending> void mma_wait(float (&)[128]) { mma_wait<pending>(); }
template <class T> uint32_t pack(float low, float high) {
  const auto bits = [](float x) {
    return uint32_t{std::is_same_v<T, __half> ? __builtin_bit_cast(uint16_t, __float2half_rn(x)) : __float2bfloat16_rn(x).bits};
  };
  return bits(low) | bits(high) << 16;
}
template <class T> void unpack(uint32_t both, float& low, float& high) {
  low = emulated::value(static_cast<uint16_t>(both), std::is_same_v<T, __half>);
  high = emulated::value(static_cast<uint16_t>(both >> 16), std::is_same_v<T, __half>);
}
inline float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
inline bool aligned(const void* p, uintptr_t to) { return reinterpret_cast<uintptr_t>(p) % to == 0; }
// "ld", "st": an address is a multiple of the size of the access, which vectors' are not more than 16 bytes at a time.
template <class T> T* aligned_to_16(T* p) {
  require(aligned(p, 16), "a vector not aligned to 16 bytes");
  return p;
}
// "cp.async": both addresses aligned to the 16 bytes; arrives at the wait for its group, for the thread that waits.
inline void copy_async(void* to, const void* from, int bytes) {
  require(shared_address(to) % 16 == 0 && aligned(from, 16) && bytes >= 0 && bytes <= 16, "cp.async");
  char* const there = emulated::at(*self->cta, shared_address(to), 16);
  std::memset(there, 0xff, 16);
  self->copies.push_back({there, static_cast<const char*>(from), bytes});
}
inline void copy_commit() {
  size_t before = 0;
  for (const size_t batch : self->batches) before += batch;
  self->batches.push_back(self->copies.size() - before);
}
template <int pending> void copy_wait() {
  for (; self->batches.size() > pending; self->batches.pop_front())
    for (size_t left = self->batches.front(); left-- > 0; self->copies.pop_front()) {
      const emulated::AsyncCopy& copy = self->copies.front();
      self->cta->unseen[shared_address(copy.to)] = self;
      std::memset(copy.to, 0, 16), std::memcpy(copy.to, copy.from, copy.bytes);
    }
}
// "ldmatrix": lanes 8·i to 8·i + 7 name the rows of matrix i; a lane has row lane / 4, elements 2·(lane % 4) and the next, of each, and
// with .trans the same of its transpose. Read as the last lane comes, before any may go on to write. Bank conflicts, which only cost time,
// are errors too.
inline void load_matrices(uint32_t (&r)[4], const char* row, bool transposed) {
  require(shared_address(row) % 16 == 0, "ldmatrix from an address not aligned to 16 bytes");
  emulated::Warp& w = *self->warp;
  const int side = (self->meetings + 1) % 2;
  meet(transposed ? 21 : 20, shared_address(row), [&, cta = self->cta] {
    for (int i = 0; i < 32; ++i) require(!cta->unseen.count(w.values[side][i]), "a copy read that no barrier has shown to others");
    for (int i = 0, banks = 0; i < 32; ++i) {  // 32 of 4 bytes, which the eight rows of a matrix share
      banks = (i % 8 ? banks : 0) | 1 << w.values[side][i] / 16 % 8;
      require(i % 8 < 7 || banks == 255, "rows of a matrix of ldmatrix in the same banks");
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        for (int e = 0; e < 2; ++e) {
          const int line = lane / 4, place = 2 * (lane % 4) + e;
          const uint32_t at = w.values[side][8 * i + (transposed ? place : line)] + 2 * (transposed ? line : place);
          std::memcpy(reinterpret_cast<char*>(&w.loaded[side][lane][i]) + 2 * e, emulated::at(*cta, at, 2), 2);
        }
  });
  std::copy_n(w.loaded[side][self->lane], 4, r);
}
inline void load_matrices(uint32_t (&r)[4], const char* row) { load_matrices(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const char* row) { load_matrices(r, row, true); }
// "mma.m16n8k16", fragments: element i of b has row 2·t + i % 2, 8 more from i = 2 on, and column g; d[i] has row g, 8 more from i = 2 on,
// and column 2·t + i % 2.
template <class T> void mma_sync(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands { const uint32_t* a; uint32_t b[2]; float* d; } own{a, {b0, b1}, d};
  emulated::Warp& w = *self->warp;
  const int side = (self->meetings + 1) % 2;
  meet(std::is_same_v<T, __half> ? 22 : 23, reinterpret_cast<uint64_t>(&own), [&] {
    const auto of = [&](int lane) { return reinterpret_cast<const Operands*>(w.values[side][lane]); };
    const auto element = [](const uint32_t* registers, int i) {
      return emulated::value(static_cast<uint16_t>(registers[i / 2] >> i % 2 * 16), std::is_same_v<T, __half>);
    };
    static float left[16][16], right[16][8];
    emulated::gather_left(left, std::is_same_v<T, __half>, [&](int lane) { return of(lane)->a; });
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) right[2 * t + i % 2 + (i < 2 ? 0 : 8)][g] = element(of(lane)->b, i);
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) sum += left[lane / 4 + (i < 2 ? 0 : 8)][k] * right[k][2 * (lane % 4) + i % 2];
        of(lane)->d[i] += sum;
      }
  });
}
inline float flushed(double x) { return std::abs(x) < 0x1p-126 ? 0.0f : static_cast<float>(x); }
inline float exp2_fast(float x) { return flushed(std::exp2(static_cast<double>(x))); }
inline float reciprocal(float x) { return flushed(1.0 / x); }
// cuda.h: what cuTensorMapEncodeTiled demands of a tensor without interleaving.
inline CUresult encode_tiled(
    CUtensorMap* map, int, int rank, void* data, const uint64_t* size, const uint64_t* pitch, const uint32_t* box, const uint32_t* step,
    int, int swizzle, int, int) {
  const auto aligned = [](const void* p, uintptr_t to) { return reinterpret_cast<uintptr_t>(p) % to == 0; };
  bool fits = (rank == 2 || rank == 3) && aligned(map, 64) && aligned(data, 16) && pitch[0] >= 2 * size[0];
  for (int i = 0; i < rank; ++i) fits &= size[i] > 0 && size[i] <= 1ull << 32 && box[i] > 0 && box[i] <= (i < 2 ? 256 : 1) && step[i] == 1;
  for (int i = 0; i + 1 < rank; ++i) fits &= pitch[i] % 16 == 0 && pitch[i] < 1ull << 40;
  const int64_t depth = rank == 3 ? size[2] : 1, further = rank == 3 ? pitch[1] : 0;
  fits &= rank == 2 || (pitch[1] % pitch[0] == 0 && pitch[1] >= size[1] * pitch[0]);
  *map = {static_cast<char*>(data), int64_t(size[0]), int64_t(size[1]), depth, int64_t(pitch[0]), further, int(box[0]), int(box[1])};
  return fits && swizzle == CU_TENSOR_MAP_SWIZZLE_128B && box[0] * 2 == 128 ? CUDA_SUCCESS : 1;
}
inline auto tensor_map_encoder() { return &encode_tiled; }
}  // namespace clipfast
