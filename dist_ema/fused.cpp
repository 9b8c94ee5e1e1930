// shadow += weight * (source - shadow) over lists of tensors, for several averages at once, in one parallel region.
//
// Compiled on first use and loaded with ctypes: no torch headers, so that it takes a second.
// The arithmetic is that of torch.lerp on the CPU, bit for bit: one subtraction and one fused multiply-add, from the
// nearer end. Never compile it with -ffast-math: it would drop the tests for NaN and Inf.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

// Elements that a thread takes at a time: few enough that threads which lose their core do not keep the others waiting.
constexpr int64_t kChunk = 1 << 16;
// Elements that go through all averages before the next ones: the source stays in the first-level cache.
constexpr int64_t kBlock = 1 << 11;

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline bool is_finite(float value) { return (to_bits(value) & 0x7f800000u) != 0x7f800000u; }

// torch's kernels fuse wherever their vectors can; DIST_EMA_NO_FMA is set where this torch runs its plain ones.
inline float multiply_add(float a, float b, float c) {
#if !defined(DIST_EMA_NO_FMA) && (defined(__FMA__) || defined(__FP_FAST_FMAF) || defined(__aarch64__))
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

struct Float32 {
    using type = float;
    static float load(float value) { return value; }
};

struct BFloat16 {
    using type = uint16_t;
    static float load(uint16_t value) { return from_bits(static_cast<uint32_t>(value) << 16); }
};

struct Float16 {
    using type = uint16_t;
    static float load(uint16_t value) {
        // Moves exponent and fraction into place, and corrects the exponent's bias. Subnormals become normal numbers by
        // a subtraction, so that it also holds where the processor flushes subnormal operands to zero.
        const uint32_t moved = (value & 0x7fffu) << 13;
        const uint32_t exponent = moved & 0x0f800000u;
        const uint32_t normal = moved + (112u << 23);
        const uint32_t special = moved | 0x7f800000u;
        const uint32_t subnormal = to_bits(from_bits(normal + (1u << 23)) - from_bits(113u << 23));
        const uint32_t magnitude = exponent == 0 ? subnormal : exponent == 0x0f800000u ? special : normal;
        return from_bits(magnitude | (value & 0x8000u) << 16);
    }
};

// The loop has no branch, so it is vectorised. The guard costs it a store into the first-level cache and one operation:
// a result times zero is zero unless the result is NaN or Inf, and no result is finite whose source or shadow is not.
// (A finite blend may overflow too; then the second loop changes nothing.) Returns how many sources were not finite.
template <typename Source, bool guarded, bool near>
int64_t blend(float *__restrict shadow, const typename Source::type *__restrict source, int64_t count, float weight) {
    const float coefficient = near ? weight : weight - 1.0f;
    float before[guarded ? kBlock : 1];
    float check = 0.0f;
#pragma omp simd reduction(+ : check)
    for (int64_t i = 0; i < count; i++) {
        const float start = shadow[i];
        const float end = Source::load(source[i]);
        const float value = multiply_add(coefficient, end - start, near ? start : end);
        if (guarded) {
            before[i] = start;
            check = multiply_add(value, 0.0f, check);
        }
        shadow[i] = value;
    }
    if (!guarded || check == 0.0f) return 0;
    int64_t skipped = 0;
    for (int64_t i = 0; i < count; i++) {
        const float end = Source::load(source[i]);
        if (!is_finite(end)) {
            shadow[i] = before[i];
            skipped++;
        } else if (!is_finite(before[i])) {
            shadow[i] = end;
        }
    }
    return skipped;
}

template <typename Source>
int64_t blend(float *shadow, const void *source, int64_t low, int64_t count, float weight, bool guarded) {
    const auto *values = static_cast<const typename Source::type *>(source) + low;
    const bool near = (weight < 0 ? -weight : weight) < 0.5f;
    if (guarded) {
        return near ? blend<Source, true, true>(shadow + low, values, count, weight)
                    : blend<Source, true, false>(shadow + low, values, count, weight);
    }
    return near ? blend<Source, false, true>(shadow + low, values, count, weight)
                : blend<Source, false, false>(shadow + low, values, count, weight);
}

int64_t blend(int64_t dtype, float *shadow, const void *source, int64_t low, int64_t count, float weight, bool guarded) {
    switch (dtype) {
        case 0: return blend<Float32>(shadow, source, low, count, weight, guarded);
        case 1: return blend<BFloat16>(shadow, source, low, count, weight, guarded);
        default: return blend<Float16>(shadow, source, low, count, weight, guarded);
    }
}

}  // namespace

// tensors, averages: how many.
// offsets: tensors + 1; where each tensor begins in all of them laid end to end.
// sources: the first element of each; dtypes: 0 for fp32, 1 for bf16, 2 for fp16.
// shadows: the first element of each, average by average. weights: of each average.
// Returns how many source elements were not finite, and therefore skipped; 0 without the guard.
extern "C" int64_t dist_ema_lerp(int64_t tensors, int64_t averages, const int64_t *offsets, const void *const *sources,
                                 const int64_t *dtypes, float *const *shadows, const double *weights, int64_t guarded,
                                 int64_t threads) {
    const int64_t total = offsets[tensors];
    const int64_t chunks = (total + kChunk - 1) / kChunk;
    int64_t skipped = 0;
#pragma omp parallel for schedule(dynamic) reduction(+ : skipped) num_threads(threads) if (threads > 1 && chunks > 1)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        int64_t position = chunk * kChunk;
        const int64_t stop = std::min(position + kChunk, total);
        int64_t tensor = std::upper_bound(offsets, offsets + tensors + 1, position) - offsets - 1;
        while (position < stop) {
            const int64_t low = position - offsets[tensor];
            const int64_t count = std::min({kBlock, stop - position, offsets[tensor + 1] - position});
            for (int64_t average = 0; average < averages; average++) {
                const int64_t found = blend(dtypes[tensor], shadows[average * tensors + tensor], sources[tensor], low,
                                            count, static_cast<float>(weights[average]), guarded != 0);
                skipped += average == 0 ? found : 0;
            }
            position += count;
            while (position < stop && position >= offsets[tensor + 1]) tensor++;  // empty tensors too
        }
    }
    return skipped;
}
