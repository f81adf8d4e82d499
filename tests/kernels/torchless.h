// What kernels/*/cpu.cpp knows of torch, in plain C++, and a program that runs their operators: for machines that have no torch,
// such as an Arm processor in qemu. Requests come by standard input, results leave by standard output (test_arm.py).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

namespace torch::headeronly {
enum class ScalarType : int64_t { Float, Int, Char };  // 4, 4 and 1 bytes

struct Sizes {
  std::vector<int64_t> held;
  Sizes(std::initializer_list<int64_t> given) : held(given) {}
  Sizes(std::vector<int64_t> given) : held(std::move(given)) {}
  auto begin() const { return held.begin(); }
  auto end() const { return held.end(); }
  size_t size() const { return held.size(); }
  int64_t operator[](size_t i) const { return held[i]; }
  int64_t& operator[](size_t i) { return held[i]; }
  Sizes slice(size_t from, size_t count) const { return std::vector<int64_t>(begin() + from, begin() + from + count); }
};
}  // namespace torch::headeronly

namespace torch::stable {
using headeronly::ScalarType, headeronly::Sizes;

struct Tensor {
  std::shared_ptr<char> memory;  // of exactly what sizes and strides reach: a sanitizer sees what goes beyond
  Sizes shape;
  std::vector<int64_t> steps;
  ScalarType type = ScalarType::Float;

  int64_t dim() const { return shape.size(); }
  int64_t size(int64_t i) const { return shape[i]; }
  int64_t stride(int64_t i) const { return steps[i]; }
  const Sizes& sizes() const { return shape; }
  void* data_ptr() const { return memory.get(); }
  int64_t item() const { return type == ScalarType::Char ? 1 : 4; }
  bool is_contiguous() const {
    int64_t step = 1;
    bool same = true;
    for (int64_t i = dim(); i-- > 0; step *= shape[i]) same = same && (steps[i] == step || shape[i] == 1);
    return same || !numel();
  }
  int64_t numel() const {
    int64_t count = 1;
    for (int64_t size : shape.held) count *= size;
    return count;
  }
  int64_t bytes() const {
    int64_t last = 0;
    for (int64_t i = 0; i < dim(); ++i) last += (shape[i] - 1) * steps[i];
    return numel() ? (last + 1) * item() : 0;
  }
  void allocate() { memory.reset(static_cast<char*>(std::malloc(bytes() + !bytes())), std::free); }
};

inline Tensor made(const Sizes& shape, const std::vector<int64_t>& steps, ScalarType type) {
  Tensor out{nullptr, shape, steps, type};
  out.allocate();
  std::memset(out.data_ptr(), 0x7f, out.bytes());  // what nobody writes is 3e38
  return out;
}
inline Tensor new_empty(const Tensor& like, const Sizes& sizes) {
  std::vector<int64_t> steps(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) steps[i - 1] = steps[i] * std::max<int64_t>(1, sizes[i]);
  return made(sizes, steps, like.type);
}
inline Tensor new_zeros(const Tensor& like, const Sizes& sizes) {
  Tensor out = new_empty(like, sizes);
  std::memset(out.data_ptr(), 0, out.bytes());
  return out;
}
inline Tensor empty_like(const Tensor& like) { return made(like.shape, like.steps, like.type); }
inline Tensor transpose(Tensor t, int64_t i, int64_t j) {
  std::swap(t.shape[i], t.shape[j]);
  std::swap(t.steps[i], t.steps[j]);
  return t;
}
inline Tensor contiguous(const Tensor& t) {
  Tensor out = new_empty(t, t.sizes());
  const int64_t item = t.item();
  for (int64_t n = 0; n < t.numel(); ++n) {
    int64_t rest = n, at = 0;
    for (int64_t i = t.dim(); i-- > 0; rest /= t.shape[i]) at += rest % t.shape[i] * t.steps[i];
    std::memcpy(out.memory.get() + n * item, t.memory.get() + at * item, item);
  }
  return out;
}
inline Tensor to(const Tensor& t, ScalarType type) {
  if (t.type != type) throw std::runtime_error("expected fp32");
  return t;
}
// In pieces, as by three threads.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  const int64_t piece = std::max(std::max<int64_t>(1, grain), (end - begin + 2) / 3);
  for (int64_t i = begin; i < end; i += piece) f(i, std::min(end, i + piece));
}

inline uint32_t get_num_threads() { return 3; }

// ---- operators by name

using Value = std::optional<std::variant<Tensor, int64_t, double, std::vector<Tensor>>>;
using Operator = std::function<std::vector<Tensor>(const std::vector<Value>&)>;
inline std::map<std::string, Operator>& operators() {
  static std::map<std::string, Operator> held;
  return held;
}
struct Library {
  void impl(const char* name, Operator f) { operators()[name] = std::move(f); }
};

template <class T>
struct As {
  static T from(const Value& value) {
    if constexpr (std::is_same_v<T, bool>)
      return std::get<int64_t>(*value);
    else
      return std::get<T>(*value);
  }
};
template <class T>
struct As<std::optional<T>> {
  static std::optional<T> from(const Value& value) { return value ? std::optional<T>(As<T>::from(value)) : std::nullopt; }
};
inline std::vector<Tensor> listed(const Tensor& t) { return {t}; }
template <class... T>
std::vector<Tensor> listed(const std::tuple<T...>& results) {
  return std::apply([](const auto&... t) { return std::vector<Tensor>{t...}; }, results);
}
template <class R, class... A, size_t... i>
Operator boxed(R (*f)(A...), std::index_sequence<i...>) {
  return [f](const std::vector<Value>& given) { return listed(f(As<std::decay_t<A>>::from(given.at(i))...)); };
}
template <class R, class... A>
Operator boxed(R (*f)(A...)) {
  return boxed(f, std::index_sequence_for<A...>{});
}
}  // namespace torch::stable

#define TORCH_BOX(f) torch::stable::boxed(f)
#define STABLE_TORCH_LIBRARY_IMPL(space, key, m)                       \
  static void registered(torch::stable::Library& m);                   \
  static const bool done = [] {                                        \
    torch::stable::Library library;                                    \
    registered(library);                                               \
    return true;                                                       \
  }();                                                                 \
  static void registered(torch::stable::Library& m)
#define STD_TORCH_CHECK(condition, ...)                                \
  if (!(condition)) throw std::runtime_error([&](const auto&... said) { \
    std::ostringstream all;                                            \
    (all << ... << said);                                              \
    return all.str();                                                  \
  }(__VA_ARGS__))

#ifdef CLIPFAST_DRIVER
namespace {
using namespace torch::stable;

void read(void* to, size_t bytes) {
  if (bytes && std::fread(to, bytes, 1, stdin) != 1) std::exit(0);  // whoever asked is gone
}
int64_t number() {
  int64_t n;
  read(&n, 8);
  return n;
}
std::vector<int64_t> numbers(int64_t count) {
  std::vector<int64_t> all(count);
  read(all.data(), 8 * count);
  return all;
}
void write(const void* from, size_t bytes) { std::fwrite(from, 1, bytes, stdout); }
void write(int64_t n) { write(&n, 8); }

// 0: nothing; 1: a tensor: its type, dimensions, sizes, strides, memory; 2: an integer; 3: a double; 4: tensors, after their number.
Value value() {
  switch (number()) {
    case 0: return std::nullopt;
    case 1: {
      const auto type = static_cast<ScalarType>(number());
      const int64_t dimensions = number();
      auto shape = numbers(dimensions), steps = numbers(dimensions);
      const Tensor t = made(shape, steps, type);
      read(t.data_ptr(), t.bytes());
      return t;
    }
    case 2: return number();
    case 4: {
      std::vector<Tensor> all(number(), Tensor{nullptr, {}, {}});
      for (Tensor& t : all) t = std::get<Tensor>(*value());
      return all;
    }
    default: {
      double d;
      read(&d, 8);
      return d;
    }
  }
}
}  // namespace

int main() {
  for (;;) {
    std::string name(number(), ' ');
    read(name.data(), name.size());
    std::vector<Value> given(number());
    for (Value& one : given) one = value();
    const std::vector<Tensor> results = operators().at(name)(given);
    write(results.size());
    for (const Tensor& t : results) {
      write(t.dim());
      write(t.shape.held.data(), 8 * t.dim());
      write(t.steps.data(), 8 * t.dim());
      write(t.data_ptr(), t.bytes());
    }
    std::fflush(stdout);
  }
}
#endif
