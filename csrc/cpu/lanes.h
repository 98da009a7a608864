// Vectors of numbers in a register, by the compiler's vector extension: arithmetic, comparison and
// ?: work lane by lane.
//
// For files that are compiled once per instruction set. Such a file sets the compiler's target in its
// first lines, names it in FASTJAC_TARGET_NAME, which becomes the namespace of all that depends on it
// (two functions of one name, compiled differently, would be one to the linker), and the width of its
// registers in FASTJAC_VECTOR_BYTES. It calls no template of PyTorch or of the standard library.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "small_floats.h"

// x86's AVX2 and AVX-512: the pragma does not define the compiler's own macros in time.
#if FASTJAC_VECTOR_BYTES > 16
#define FASTJAC_F16C
#include <immintrin.h>
#endif
#if FASTJAC_VECTOR_BYTES == 64
#define FASTJAC_AVX512
#endif

// After a lambda's parameters: a call for each vector costs as much as what is done with it.
#define FASTJAC_INLINED __attribute__((always_inline))

#pragma GCC diagnostic ignored "-Wpsabi" // these vectors are never passed between files

namespace fastjac {

namespace FASTJAC_TARGET_NAME {

template <typename T, int N>
struct LanesOf {
  typedef T type __attribute__((vector_size(sizeof(T) * N)));
};
template <typename T>
struct LanesOf<T, 1> {
  typedef T type;
};
template <typename T, int N>
using Lanes = typename LanesOf<T, N>::type;

// Of an accumulator's size: the lanes of a comparison.
template <typename acc_t>
using index_of = std::conditional_t<sizeof(acc_t) == 8, int64_t, int32_t>;

// A register's lanes of an accumulator type.
template <typename acc_t>
constexpr int kLanes = FASTJAC_VECTOR_BYTES / sizeof(acc_t);

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename To, int N, typename From>
inline Lanes<To, N> convert(const From& from) {
  if constexpr (N == 1) {
    return static_cast<To>(from);
  } else {
    return __builtin_convertvector(from, Lanes<To, N>);
  }
}

// Integers kept as bytes. (GCC 12 converts these one after the other.)
template <typename To, int N>
inline Lanes<To, N> from_bytes(const Lanes<int8_t, N>& x) {
#ifdef FASTJAC_AVX512
  if constexpr (std::is_same_v<To, int32_t> && N == 16) {
    return (Lanes<To, N>)_mm512_maskz_cvtepi8_epi32(-1, (__m128i)x);
  }
#elif defined(FASTJAC_F16C)
  if constexpr (std::is_same_v<To, int32_t> && N == 8) {
    return (Lanes<To, N>)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bit_cast<long long>(x)));
  }
#endif
  return convert<To, N>(x);
}
template <int N, typename From>
inline Lanes<int8_t, N> to_bytes(const From& x) {
#ifdef FASTJAC_AVX512
  if constexpr (sizeof(From) == 64 && N == 16) {
    return (Lanes<int8_t, N>)_mm512_maskz_cvtepi32_epi8(-1, (__m512i)x);
  }
#endif
  return convert<int8_t, N>(x);
}

// The same for equal() and the lanes of N numbers as wide as To: AVX-512 compares 16 bytes as they are.
template <typename To, int N>
inline auto comparable(const Lanes<int8_t, N>& x) {
#ifdef FASTJAC_AVX512
  if constexpr (N == 16) {
    return x;
  } else
#endif
  {
    return from_bytes<To, N>(x);
  }
}

// Those of the lanes from kFirst on, in float64. (GCC 12 converts them two by two.)
template <int kFirst, typename T, int... i>
inline auto widened(const T& x, std::integer_sequence<int, i...>) {
  constexpr int N = sizeof...(i);
  const auto part = __builtin_shufflevector(x, x, (kFirst + i)...);
#ifdef FASTJAC_AVX512
  if constexpr (sizeof part == 32 && N == 8) {
    return (Lanes<double, N>)_mm512_maskz_cvtps_pd(-1, (__m256)part);
  }
#elif defined(FASTJAC_F16C)
  if constexpr (sizeof part == 16 && N == 4) {
    return (Lanes<double, N>)_mm256_cvtps_pd((__m128)part);
  }
#endif
  return convert<double, N>(part);
}

template <int N, typename T>
inline Lanes<T, N> load_raw(const void* p) {
  Lanes<T, N> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// Stored as T, whose numbers lie at p: what is stored as bytes, by memcpy, may be a pointer or a size to
// the compiler, and it loads all of those again.
template <typename T, int N>
struct InMemory {
  typedef T type __attribute__((vector_size(sizeof(T) * N), aligned(alignof(T))));
};
template <typename T>
struct InMemory<T, 1> {
  typedef T type;
};
template <typename T, typename V>
inline void store_as(void* p, const V& x) {
  using type = typename InMemory<T, sizeof(V) / sizeof(T)>::type;
  *static_cast<type*>(p) = bit_cast<type>(x);
}

// What a comparison of lanes gives, and what select() asks: integers 0 and -1 as wide as the lanes, or
// a bool. Where AVX-512 has 16 of them it is a register of bits, by the processor's own instructions: GCC
// takes an operation on two comparisons of the vector extension apart, bit by bit.
template <typename T>
inline auto greater(const T& a, const T& b) {
  return a > b;
}
// Neither a < b nor a = b.
template <typename T>
inline auto not_at_most(const T& a, const T& b) {
  return ~(a <= b);
}
template <typename T>
inline auto equal(const T& a, const T& b) {
  return a == b;
}
// Whether either is a NaN.
template <typename T>
inline auto unordered(const T& a, const T& b) {
  return (a != a) | (b != b);
}
template <typename T>
inline auto unordered(const T& x) {
  return x != x;
}
// The larger; of a NaN and a number, either.
template <typename T>
inline T larger(const T& a, const T& b) {
  return a > b ? a : b;
}
template <typename M, typename T>
inline T select(const M& where, const T& a, const T& b) {
  return where ? a : b;
}
template <typename M>
inline bool any(const M& where) {
#ifdef FASTJAC_F16C
  if constexpr (sizeof(M) == 32) return !_mm256_testz_si256((__m256i)where, (__m256i)where);
#endif
  constexpr int kParts = sizeof(M) / sizeof(int64_t);
  const auto parts = bit_cast<Lanes<int64_t, kParts>>(where);
  int64_t all = 0;
  for (int i = 0; i < kParts; ++i) all |= parts[i];
  return all != 0;
}
template <typename M, typename T>
inline T add_where(const M& where, const T& a, const T& b) {
  return a + (where ? b : T{});
}

#ifdef FASTJAC_AVX512
struct Mask16 {
  __mmask16 bits;
};
using Floats16 = Lanes<float, 16>;
using Integers16 = Lanes<int32_t, 16>;
using Bytes16 = Lanes<int8_t, 16>;

inline Mask16 operator|(Mask16 a, Mask16 b) {
  return {_kor_mask16(a.bits, b.bits)};
}
inline Mask16 operator&(Mask16 a, Mask16 b) {
  return {_kand_mask16(a.bits, b.bits)};
}
inline Mask16 operator~(Mask16 a) {
  return {_knot_mask16(a.bits)};
}
inline bool any(Mask16 a) {
  return a.bits != 0;
}
inline Mask16 greater(const Floats16& a, const Floats16& b) {
  return {_mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ)};
}
inline Mask16 not_at_most(const Floats16& a, const Floats16& b) {
  return {_mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLE_UQ)};
}
inline Mask16 greater(const Integers16& a, const Integers16& b) {
  return {_mm512_cmpgt_epi32_mask((__m512i)a, (__m512i)b)};
}
inline Mask16 equal(const Integers16& a, const Integers16& b) {
  return {_mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b)};
}
inline Mask16 equal(const Bytes16& a, const Bytes16& b) {
  return {_mm_cmpeq_epi8_mask((__m128i)a, (__m128i)b)};
}
inline Mask16 unordered(const Floats16& a, const Floats16& b) {
  return {_mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q)};
}
inline Mask16 unordered(const Floats16& x) {
  return unordered(x, x);
}
inline Floats16 larger(const Floats16& a, const Floats16& b) {
  return (Floats16)_mm512_maskz_max_ps(-1, (__m512)a, (__m512)b);
}
inline Floats16 select(Mask16 where, const Floats16& a, const Floats16& b) {
  return (Floats16)_mm512_mask_blend_ps(where.bits, (__m512)b, (__m512)a);
}
inline Floats16 add_where(Mask16 where, const Floats16& a, const Floats16& b) {
  return (Floats16)_mm512_mask_add_ps((__m512)a, where.bits, (__m512)a, (__m512)b);
}
inline Integers16 select(Mask16 where, const Integers16& a, const Integers16& b) {
  return (Integers16)_mm512_mask_blend_epi32(where.bits, (__m512i)b, (__m512i)a);
}
#endif

// exp(x), to two units in the last place. In float64 it is the C library's, one lane after the other.
inline double exponential(double x) {
  return std::exp(x);
}
[[maybe_unused]] __attribute__((noinline)) static void exponential_each(double* x, int n) {
  for (int i = 0; i < n; ++i) x[i] = std::exp(x[i]);
}
template <typename T>
inline T exponential(const T& x) {
  constexpr int N = sizeof(T) / sizeof(x[0]);
  if constexpr (sizeof(x[0]) == sizeof(double)) {
    double each[N];
    std::memcpy(each, &x, sizeof x);
    exponential_each(each, N);
    return load_raw<N, double>(each);
  } else {
    using Bits = Lanes<int32_t, N>;
    const T low = T{} - 104.0f, high = T{} + 89.0f;
    const T bounded = x < low ? low : x > high ? high : x; // keeps a NaN
    const T turn = T{} + 0x1.8p23f; // adding it rounds to an integer
    const T n = (bounded * 0x1.715476p0f + turn) - turn;
    const T r = (bounded - n * 0x1.62ep-1f) - n * 0x1.0bfbe8p-15f; // ln 2 in two parts
    T y = T{} + 0x1.6c16c2p-10f; // 1/720
    y = y * r + 0x1.111112p-7f;
    y = y * r + 0x1.555556p-5f;
    y = y * r + 0x1.555556p-3f;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    // 2^n in two factors: n may lie outside the exponents of normal numbers.
    const Bits power = convert<int32_t, N>(n), half = power >> 1;
    const T first = bit_cast<T>(Bits((half + 127) << 23));
    const T second = bit_cast<T>(Bits((power - half + 127) << 23));
    return y * first * second;
  }
}
inline float exponential(float x) {
  const Lanes<float, 4> lanes = {x, x, x, x};
  return exponential(lanes)[0];
}

} // namespace FASTJAC_TARGET_NAME
} // namespace fastjac
