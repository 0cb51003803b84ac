"""C++ of the flex operators for CPUs: one pass over memory, or two where the exponent is unknown.

Each loop is simple enough for the compiler to make vectors of it. Threads share nothing but sums of
integers and a maximum, so their number changes no bit.
"""

from __future__ import annotations

SOURCE = r"""
// PyTorch's flags are for code that is vectorised by hand, and keep traps.
#pragma GCC optimize("tree-loop-vectorize", "no-trapping-math")
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {
constexpr int32_t kInfinity = 255 << 23, kMagnitude = 0x7fffffff, kUnknown = INT32_MIN;
constexpr int64_t kBlock = 4096;  // Uniform numbers of a block stay in the first-level cache.

inline int32_t magnitude_of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & kMagnitude;
}

inline float power_of_two(int32_t exponent) {
    const int32_t bits = (exponent + 127) << 23;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline int32_t clamped(int32_t e) { return e < -126 ? -126 : e > 126 ? 126 : e; }

int32_t amax_of(const float* x, int64_t n, int threads) {
    int32_t amax = 0;
    #pragma omp parallel for simd num_threads(threads) reduction(max : amax)
    for (int64_t i = 0; i < n; ++i) {
        const int32_t m = magnitude_of(x[i]);
        const int32_t finite = m < kInfinity ? m : 0;
        amax = finite > amax ? finite : amax;
    }
    return amax;
}

// 24-bit uniform numbers of elements `first` (a multiple of 4) and on; see graphopt.ops.philox.
void uniform(float* out, int64_t first, int64_t count, const int64_t* seed, uint32_t use) {
    const uint32_t step = (uint32_t)seed[1];
    #pragma omp simd
    for (int64_t g = 0; g < (count + 3) / 4; ++g) {
        const uint64_t group = (uint64_t)(first / 4 + g);
        uint32_t a = (uint32_t)group, b = (uint32_t)(group >> 32), c = step, d = use;
        uint32_t k = (uint32_t)seed[0], l = (uint32_t)((uint64_t)seed[0] >> 32);
        for (int round = 0; round < 10; ++round) {
            const uint64_t p = (uint64_t)a * 0xD2511F53u, q = (uint64_t)c * 0xCD9E8D57u;
            a = (uint32_t)(q >> 32) ^ b ^ k;
            b = (uint32_t)q;
            c = (uint32_t)(p >> 32) ^ d ^ l;
            d = (uint32_t)p;
            k += 0x9E3779B9u;
            l += 0xBB67AE85u;
        }
        out[4 * g] = (float)(int32_t)(a >> 8) * 0x1p-24f;
        out[4 * g + 1] = (float)(int32_t)(b >> 8) * 0x1p-24f;
        out[4 * g + 2] = (float)(int32_t)(c >> 8) * 0x1p-24f;
        out[4 * g + 3] = (float)(int32_t)(d >> 8) * 0x1p-24f;
    }
}

inline int16_t result(float m, float, float, int16_t) { return (int16_t)(int32_t)m; }
// The sum turns -0 into +0.
inline float result(float m, float unit, float zero, float) { return m * unit + zero; }

template <typename Out, bool kRandom>
void run(const float* x, Out* out, int64_t n, int32_t e, int32_t limit, const int64_t* seed,
         uint32_t use, int threads, int32_t* statistics) {
    const float factor = power_of_two(-e), unit = power_of_two(e), most = (float)limit;
    // Unknown to the compiler, which may leave out the addition of a literal zero under its flags.
    const float zero = unit - unit;
    int32_t amax = 0;
    int64_t saturated = 0, nans = 0;
    #pragma omp parallel for num_threads(threads) reduction(max : amax) \
        reduction(+ : saturated, nans)
    for (int64_t block = 0; block < (n + kBlock - 1) / kBlock; ++block) {
        const int64_t start = block * kBlock, size = n - start < kBlock ? n - start : kBlock;
        const float* in = x + start;
        Out* place = out + start;
        float u[kRandom ? kBlock : 1];
        if (kRandom) uniform(u, start, size, seed, use);
        int32_t most_here = 0, saturated_here = 0, nans_here = 0;
        #pragma omp simd reduction(max : most_here) reduction(+ : saturated_here, nans_here)
        for (int64_t i = 0; i < size; ++i) {
            const int32_t m = magnitude_of(in[i]);
            const float y = in[i] * factor;
            float r;
            if (kRandom) {
                const float low = std::floor(y);
                r = low + (u[i] < y - low ? 1.0f : 0.0f);
            } else {
                r = std::nearbyint(y);
            }
            const int32_t finite = m < kInfinity ? m : 0;
            most_here = finite > most_here ? finite : most_here;
            saturated_here += std::fabs(r) > most;
            nans_here += m > kInfinity;
            r = r < -most ? -most : r;
            r = r > most ? most : r;
            r = m > kInfinity ? 0.0f : r;
            place[i] = result(r, unit, zero, Out());
        }
        amax = most_here > amax ? most_here : amax;
        saturated += saturated_here;
        nans += nans_here;
    }
    statistics[0] = amax;
    statistics[1] = (int32_t)saturated;
    statistics[2] = (int32_t)nans;
}

template <typename Out>
void flex(const float* x, Out* out, int64_t n, const int32_t* exponent, int mantissa,
          const int64_t* seed, int64_t use, int threads, int32_t* statistics) {
    int32_t used = clamped(*exponent);
    statistics[3] = used;
    if (*exponent == kUnknown) {
        const int32_t amax = amax_of(x, n, threads), limit = (1 << 23) - (1 << (24 - mantissa));
        used = clamped((amax >> 23) - 125 - mantissa + ((amax & 0x7fffff) >= limit));
        if (amax == 0) used = 0;
        statistics[3] = amax == 0 ? kUnknown : used;
    }
    const int32_t most = (1 << (mantissa - 1)) - 1;
    if (seed)
        run<Out, true>(x, out, n, used, most, seed, (uint32_t)use, threads, statistics);
    else
        run<Out, false>(x, out, n, used, most, seed, 0, threads, statistics);
}
}  // namespace

extern "C" void flex_quantise(const float* x, int16_t* out, int64_t n, const int32_t* exponent,
                              int mantissa, const int64_t* seed, int64_t use, int threads,
                              int32_t* statistics) {
    flex(x, out, n, exponent, mantissa, seed, use, threads, statistics);
}

extern "C" void flex_round(const float* x, float* out, int64_t n, const int32_t* exponent,
                           int mantissa, const int64_t* seed, int64_t use, int threads,
                           int32_t* statistics) {
    flex(x, out, n, exponent, mantissa, seed, use, threads, statistics);
}

extern "C" void flex_dequantise(const int16_t* mantissas, float* out, int64_t n,
                                const int32_t* exponent, int threads) {
    const float unit = power_of_two(*exponent == kUnknown ? 0 : clamped(*exponent));
    #pragma omp parallel for simd num_threads(threads)
    for (int64_t i = 0; i < n; ++i) out[i] = (float)mantissas[i] * unit;
}
"""
