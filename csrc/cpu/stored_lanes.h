// Vectors of numbers (lanes.h) as they lie in memory: bfloat16 and float16 are read as float32, and rounded
// where they are written; all of a vector or its first lanes, and neighbours in pairs.
#pragma once

#include "lanes.h"
#include "small_floats.h"

namespace fastjac {
namespace FASTJAC_TARGET_NAME {

#ifdef FASTJAC_AVX512
// A bfloat16 is the upper word of a float32. What permutations take: words 0, 0, 1, 1, ...; and 1, 3, 5, ...
constexpr __mmask32 kUpperWords = 0xaaaaaaaa;
using Words32 = Lanes<int16_t, 32>;
template <int... i>
inline Words32 each_word_twice(std::integer_sequence<int, i...>) {
  return Words32{(i / 2)...};
}
template <int... i>
inline Words32 upper_words(std::integer_sequence<int, i...>) {
  return Words32{(2 * i + 1)...};
}
constexpr auto kWords = std::make_integer_sequence<int, 32>();
// Its upper words are to_bfloat16().
inline __m512i rounded_up(const Floats16& x) {
  const __m512i bits = (__m512i)x, half = _mm512_set1_epi32(0x7fff);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i sum = _mm512_maskz_add_epi32(-1, bits, half);
  return _mm512_mask_add_epi32(sum, odd, bits, _mm512_set1_epi32(0x8000));
}
#endif

// N consecutive numbers, in the accumulator type.
template <int N>
inline Lanes<float, N> load(const float* p) {
  return load_raw<N, float>(p);
}
template <int N>
inline Lanes<double, N> load(const double* p) {
  return load_raw<N, double>(p);
}
template <int N>
inline Lanes<float, N> load(const BFloat16* p) {
#ifdef FASTJAC_AVX512
  if constexpr (N == 16) { // word i above a zero, in one operation
    const __m512i words = _mm512_castsi256_si512((__m256i)load_raw<4, long long>(p));
    return (Floats16)_mm512_maskz_permutexvar_epi16(
        kUpperWords, (__m512i)each_word_twice(kWords), words
    );
  }
#endif
#ifdef FASTJAC_F16C
  if constexpr (N == 8) { // each half of the register takes its four of all eight, above zeros
    const __m256i twice = _mm256_broadcastsi128_si256((__m128i)load_raw<2, long long>(p));
    const __m256i places = _mm256_setr_epi8(
        -1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, //
        -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15
    );
    return (Lanes<float, 8>)_mm256_shuffle_epi8(twice, places);
  }
#endif
  const auto bits = convert<uint32_t, N>(load_raw<N, uint16_t>(p)) << 16;
  return bit_cast<Lanes<float, N>>(bits);
}
template <int N>
inline Lanes<float, N> load(const Half* p) {
#ifdef FASTJAC_AVX512
  if constexpr (N == 16) return (Floats16)_mm512_maskz_cvtph_ps(-1, load_raw<4, long long>(p));
#endif
#ifdef FASTJAC_F16C
  if constexpr (N == 8) return (Lanes<float, 8>)_mm256_cvtph_ps(load_raw<2, long long>(p));
#endif
  using Bits = Lanes<uint32_t, N>;
  const Bits h = convert<uint32_t, N>(load_raw<N, uint16_t>(p));
  // The exponent moves from bias 15 to bias 127; denormals become normal by the product.
  const auto magnitude = bit_cast<Lanes<float, N>>(Bits((h & 0x7fffu) << 13)) * 0x1p112f;
  const Bits special = (h & 0x7c00u) == 0x7c00u ? Bits{} + 0x7f800000u : Bits{};
  return bit_cast<Lanes<float, N>>(
      Bits(bit_cast<Bits>(magnitude) | special | ((h & 0x8000u) << 16))
  );
}

// A vector of the accumulator type as it lies at p: 16 bits are rounded to the nearest, ties to even.
template <typename T>
inline T as_stored(const float*, const T& x) {
  return x;
}
template <typename T>
inline T as_stored(const double*, const T& x) {
  return x;
}
template <typename T, int N = sizeof(T) / sizeof(float)>
inline Lanes<uint16_t, N> as_stored(const BFloat16*, const T& x) {
#ifdef FASTJAC_AVX512
  if constexpr (N == 16) {
    const __m512i upper = (__m512i)upper_words(kWords);
    const auto words = (Lanes<int64_t, 8>)_mm512_maskz_permutexvar_epi16(-1, upper, rounded_up(x));
    return (Lanes<uint16_t, N>)__builtin_shufflevector(words, words, 0, 1, 2, 3);
  }
#endif
  using Bits = Lanes<uint32_t, N>;
  const Bits bits = to_bfloat16(bit_cast<Bits>(x));
#ifdef FASTJAC_F16C
  if constexpr (N == 8) {
    const __m256i wide = (__m256i)bits;
    return (Lanes<uint16_t, N>)_mm_packus_epi32(
        _mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)
    );
  }
#endif
  return convert<uint16_t, N>(bits);
}
template <typename T, int N = sizeof(T) / sizeof(float)>
inline Lanes<uint16_t, N> as_stored(const Half*, const T& x) {
#ifdef FASTJAC_AVX512
  if constexpr (N == 16) {
    return (Lanes<uint16_t, N>)_mm512_maskz_cvtps_ph(-1, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
  }
#endif
#ifdef FASTJAC_F16C
  if constexpr (N == 8) {
    return (Lanes<uint16_t, N>)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
  }
#endif
  using Bits = Lanes<uint32_t, N>;
  const Bits f = bit_cast<Bits>(x), magnitude = f & 0x7fffffffu;
  const Bits normal = (magnitude - 0x37fff001u + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: half a unit in float is a unit of the denormal, so the addition rounds.
  const Bits denormal = bit_cast<Bits>(T(bit_cast<T>(magnitude) + 0.5f)) - 0x3f000000u;
  const Bits large = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : Bits{} + 0x7c00u;
  const Bits finite = magnitude < 0x38800000u ? denormal : normal;
  const Bits bits = (magnitude >= 0x477ff000u ? large : finite) | ((f >> 16) & 0x8000u);
  return convert<uint16_t, N>(bits);
}
// What the compiler takes a stored number for.
template <typename scalar_t>
using stored_t = std::conditional_t<sizeof(scalar_t) == 2, uint16_t, scalar_t>;

template <typename scalar_t, typename T>
inline void store(scalar_t* p, const T& x) {
  store_as<stored_t<scalar_t>>(p, as_stored(p, x));
}

// How many lanes are there: all of them, or the first n.
struct Whole {};
struct Part {
  int64_t n;
};

template <int N, typename scalar_t>
inline auto load(const scalar_t* p, Whole) {
  return load<N>(p);
}
// The lanes that are not there are zero.
template <int N, typename scalar_t>
inline auto load(const scalar_t* p, Part part) {
  scalar_t there[N] = {};
  for (int64_t i = 0; i < part.n; ++i) there[i] = p[i];
  return load<N>(there);
}
template <typename scalar_t, typename T>
inline void store(scalar_t* p, const T& x, Whole) {
  store(p, x);
}
template <typename scalar_t, typename T>
inline void store(scalar_t* p, const T& x, Part part) {
  scalar_t there[sizeof(T) / sizeof(accumulator_t<scalar_t>)];
  store(there, x);
  for (int64_t i = 0; i < part.n; ++i) p[i] = there[i];
}

// Integers as wide as the accumulator, such as a comparison's lanes; those not there are -1.
template <int N, typename T>
inline Lanes<T, N> load_indices(const T* p, Whole) {
  return load_raw<N, T>(p);
}
template <int N, typename T>
inline Lanes<T, N> load_indices(const T* p, Part part) {
  T there[N];
  for (int i = 0; i < N; ++i) there[i] = i < part.n ? p[i] : T(-1);
  return load_raw<N, T>(there);
}
template <typename T, typename V>
inline void store_raw(T* p, const V& x, Whole) {
  store_as<T>(p, x);
}
template <typename T, typename V>
inline void store_raw(T* p, const V& x, Part part) {
  T there[sizeof(V) / sizeof(T)];
  std::memcpy(there, &x, sizeof x);
  for (int64_t i = 0; i < part.n; ++i) p[i] = there[i];
}

// As 16 bits each two: a byte may be a pointer or a size to the compiler, and it loads all of those again.
template <typename V>
inline void store_bytes(int8_t* p, const V& x, Whole) {
  typedef uint16_t type __attribute__((vector_size(sizeof(V)), aligned(1)));
  *reinterpret_cast<type*>(p) = bit_cast<type>(x);
}
template <typename V>
inline void store_bytes(int8_t* p, const V& x, Part part) {
  store_raw(p, x, part);
}

// Of neighbours in memory, lane by lane.
template <typename T>
struct Pair {
  T first, second;
};

// Lanes 0, 2, 4, ... or 1, 3, 5, ... of a and b one after the other.
template <int kFirst, typename T, int... i>
inline T every_other(const T& a, const T& b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (2 * i + kFirst)...);
}
// a0 b0 a1 b1 ..., from lane `kFirst` on.
template <int kFirst, typename T, int... i>
inline T interleaved(const T& a, const T& b, std::integer_sequence<int, i...>) {
  constexpr int N = sizeof...(i);
  return __builtin_shufflevector(a, b, ((kFirst + i) / 2 + (i % 2) * N)...);
}
// The last lane of a, and those of b but the last.
template <typename T, int... i>
inline T moved_up(const T& a, const T& b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (int(sizeof...(i)) - 1 + i)...);
}

// Whether two of them are the halves of 32 bits, the lower one first.
template <typename scalar_t>
constexpr bool kHalves =
    std::is_same_v<scalar_t, BFloat16> && std::endian::native == std::endian::little;

// 2 N consecutive numbers, every other one of them in a vector.
template <int N, typename scalar_t>
inline auto load_pairs(const scalar_t* p, Whole) {
  using V = Lanes<accumulator_t<scalar_t>, N>;
  if constexpr (kHalves<scalar_t>) {
    using Bits = Lanes<uint32_t, N>;
    const Bits both = load_raw<N, uint32_t>(p);
    return Pair<V>{bit_cast<V>(Bits(both << 16)), bit_cast<V>(Bits(both & 0xffff0000u))};
  } else {
    constexpr auto all = std::make_integer_sequence<int, N>();
    const V low = load<N>(p), high = load<N>(p + N);
    return Pair<V>{every_other<0>(low, high, all), every_other<1>(low, high, all)};
  }
}
// The first n of them; those that are not there are zero.
template <int N, typename scalar_t>
inline auto load_pairs(const scalar_t* p, Part part) {
  scalar_t there[2 * N] = {};
  for (int64_t i = 0; i < part.n; ++i) there[i] = p[i];
  return load_pairs<N>(there, Whole{});
}
// Both as they lie in memory, where they are halves.
template <typename V, int N = sizeof(V) / sizeof(float)>
inline Lanes<uint32_t, N> as_halves(const Pair<V>& x) {
  using Bits = Lanes<uint32_t, N>;
#ifdef FASTJAC_AVX512
  if constexpr (N == 16) {
    const __m512i low = _mm512_maskz_srli_epi32(-1, rounded_up(x.first), 16);
    return (Bits)_mm512_mask_blend_epi16(kUpperWords, low, rounded_up(x.second));
  }
#endif
  const Bits low = to_bfloat16(bit_cast<Bits>(x.first));
  const Bits high = to_bfloat16(bit_cast<Bits>(x.second));
  return low | (high << 16);
}
template <typename scalar_t, typename V>
inline void store_pairs(scalar_t* p, const Pair<V>& x, Whole) {
  constexpr int N = sizeof(V) / sizeof(accumulator_t<scalar_t>);
  if constexpr (kHalves<scalar_t>) {
    store_as<uint16_t>(p, as_halves(x));
  } else {
    constexpr auto all = std::make_integer_sequence<int, N>();
    store(p, interleaved<0>(x.first, x.second, all));
    store(p + N, interleaved<N>(x.first, x.second, all));
  }
}
template <typename scalar_t, typename V>
inline void store_pairs(scalar_t* p, const Pair<V>& x, Part part) {
  scalar_t there[2 * sizeof(V) / sizeof(accumulator_t<scalar_t>)];
  store_pairs(there, x, Whole{});
  for (int64_t i = 0; i < part.n; ++i) p[i] = there[i];
}

} // namespace FASTJAC_TARGET_NAME
} // namespace fastjac
