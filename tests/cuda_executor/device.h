// What nvcc gives to device code and a C++ compiler does not. Include it before any .cuh.
//
// Types, conversions and the vector types are the CUDA toolkit's own, whose headers serve a host
// compiler too. Shared memory is thread_local: within a function that is static storage, after
// `extern` it stays a declaration, and all of it lies in one segment of this library, which the
// executor poisons and watches. What is missing here fails to compile.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#undef __shared__
#define __shared__ thread_local
#define __launch_bounds__(...)

// Device code is to take the branches it takes on a device. Only from here on: the toolkit's
// headers would bring in instructions of a device.
#define __CUDA_ARCH__ 900

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace executor {

// Where in the source a thread waits.
struct Site {
  const char* file;
  int line;
  bool operator==(const Site&) const = default;
};

enum class Vote { kNone, kCount, kAnd, kOr };

// The block's barrier; gives the vote over the threads' predicates.
int barrier(Vote vote, bool predicate, Site site);

// The warp's barrier, which orders its lanes' memory accesses.
void warp_barrier(unsigned mask, Site site);

// The value of lane `source`. Orders no memory.
uint64_t shuffle(unsigned mask, uint64_t value, int source, Site site);

// Bit i: lane i's predicate. Orders no memory.
unsigned ballot(unsigned mask, bool predicate, Site site);

// Notes an atomic access, which conflicts with those that are not.
void atomic_access(const void* address, size_t bytes);

int lane();

// Stops the launch with an error that names the thread.
[[noreturn]] void fail(const char* what);

template <typename T>
T shuffle_as(unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8);
  static_assert(
      std::is_arithmetic_v<T> || std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16> ||
      std::is_same_v<T, __half2> || std::is_same_v<T, __nv_bfloat162>
  );
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// No other thread runs in between: threads change at waits alone.
template <typename T, typename F>
__attribute__((noinline, no_sanitize("thread"))) T atomic(T* address, const F& f) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8);
  atomic_access(address, sizeof(T));
  const T old = *address;
  *address = f(old);
  return old;
}

} // namespace executor

#define EXECUTOR_SITE \
  executor::Site {    \
    file, line        \
  }
#define EXECUTOR_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EXECUTOR_HERE) {
  executor::barrier(executor::Vote::kNone, false, EXECUTOR_SITE);
}
inline int __syncthreads_count(int predicate, EXECUTOR_HERE) {
  return executor::barrier(executor::Vote::kCount, predicate, EXECUTOR_SITE);
}
inline int __syncthreads_and(int predicate, EXECUTOR_HERE) {
  return executor::barrier(executor::Vote::kAnd, predicate, EXECUTOR_SITE);
}
inline int __syncthreads_or(int predicate, EXECUTOR_HERE) {
  return executor::barrier(executor::Vote::kOr, predicate, EXECUTOR_SITE);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EXECUTOR_HERE) {
  executor::warp_barrier(mask, EXECUTOR_SITE);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EXECUTOR_HERE) {
  const int first = executor::lane() & ~(width - 1);
  return executor::shuffle_as(mask, value, first | (source & (width - 1)), EXECUTOR_SITE);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EXECUTOR_HERE) {
  const int lane = executor::lane(), first = lane & ~(width - 1);
  const int source = lane - int(delta);
  return executor::shuffle_as(mask, value, source < first ? lane : source, EXECUTOR_SITE);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EXECUTOR_HERE) {
  const int lane = executor::lane(), last = lane | (width - 1);
  const int source = lane + int(delta);
  return executor::shuffle_as(mask, value, source > last ? lane : source, EXECUTOR_SITE);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, EXECUTOR_HERE) {
  const int lane = executor::lane(), last = lane | (width - 1);
  const int source = lane ^ lane_mask;
  return executor::shuffle_as(mask, value, source > last ? lane : source, EXECUTOR_SITE);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EXECUTOR_HERE) {
  return executor::ballot(mask, predicate, EXECUTOR_SITE);
}
inline int __any_sync(unsigned mask, int predicate, EXECUTOR_HERE) {
  return executor::ballot(mask, predicate, EXECUTOR_SITE) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EXECUTOR_HERE) {
  return executor::ballot(mask, predicate, EXECUTOR_SITE) == mask;
}

#undef EXECUTOR_SITE
#undef EXECUTOR_HERE

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> x) {
  return executor::atomic(address, [x](T old) { return T(old + x); });
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> x) {
  return executor::atomic(address, [x](T old) { return old < x ? x : old; });
}
template <typename T>
T atomicMin(T* address, std::type_identity_t<T> x) {
  return executor::atomic(address, [x](T old) { return x < old ? x : old; });
}
template <typename T>
T atomicOr(T* address, std::type_identity_t<T> x) {
  return executor::atomic(address, [x](T old) { return old | x; });
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> x) {
  return executor::atomic(address, [x](T) { return x; });
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> x) {
  return executor::atomic(address, [=](T old) { return old == expected ? x : old; });
}

// Loads and stores with a caching hint.
template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, std::type_identity_t<T> x) {
  *address = x;
}
template <typename T>
void __stcg(T* address, std::type_identity_t<T> x) {
  *address = x;
}

[[noreturn]] inline void __trap() {
  executor::fail("calls __trap()");
}

// Arithmetic that is rounded as asked for, never contracted.
inline float __fadd_rn(float x, float y) {
  return x + y;
}
inline float __fsub_rn(float x, float y) {
  return x - y;
}
inline float __fmul_rn(float x, float y) {
  return x * y;
}
inline float __fdiv_rn(float x, float y) {
  return x / y;
}
inline float __fmaf_rn(float x, float y, float z) {
  return std::fma(x, y, z);
}
inline float __frcp_rn(float x) {
  return 1 / x;
}
inline float __fsqrt_rn(float x) {
  return std::sqrt(x);
}
inline double __dadd_rn(double x, double y) {
  return x + y;
}
inline double __dsub_rn(double x, double y) {
  return x - y;
}
inline double __dmul_rn(double x, double y) {
  return x * y;
}
inline double __fma_rn(double x, double y, double z) {
  return std::fma(x, y, z);
}

// Approximate on a device, at its accuracy or better here.
inline float __expf(float x) {
  return std::exp(x);
}
inline float __fdividef(float x, float y) {
  return x / y;
}
inline float rsqrtf(float x) {
  return 1 / std::sqrt(x);
}
inline float rsqrt(float x) {
  return 1 / std::sqrt(x);
}
inline double rsqrt(double x) {
  return 1 / std::sqrt(x);
}

inline int __popc(unsigned x) {
  return std::popcount(x);
}
inline int __clz(int x) {
  return std::countl_zero(unsigned(x));
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __float_as_int(float x) {
  return std::bit_cast<int>(x);
}
inline unsigned __float_as_uint(float x) {
  return std::bit_cast<unsigned>(x);
}
inline float __int_as_float(int x) {
  return std::bit_cast<float>(x);
}
inline float __uint_as_float(unsigned x) {
  return std::bit_cast<float>(x);
}
template <typename A, typename B>
constexpr auto min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(b) < T(a) ? T(b) : T(a);
}
template <typename A, typename B>
constexpr auto max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(a) < T(b) ? T(b) : T(a);
}
