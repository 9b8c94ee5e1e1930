// shadow += weight * (source - shadow) over lists of tensors, for several averages at once, in one parallel region.
//
// Compiled on first use and loaded with ctypes: no torch headers, so that it takes seconds.
// The arithmetic is that of torch.lerp on the CPU, bit for bit: one subtraction and one fused multiply-add, from the
// nearer end. Never compile it with -ffast-math: it would drop the tests for NaN and Inf.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

// Elements that a thread takes at a time: few enough that threads which lose their core do not keep the others waiting.
constexpr int64_t kChunk = 1 << 16;
// Elements that go through all averages before the next ones: the source stays in the first-level cache.
constexpr int64_t kBlock = 1 << 9;
// The same where they are rounded, since what a block has to look up is more.
constexpr int64_t kRoundedBlock = 1 << 11;
// Averages that share one loop at most.
constexpr int64_t kTogether = 4;

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
    using bits = uint32_t;
    static float load(float value) { return value; }
    static bits is_special(float value) { return (to_bits(value) & 0x7f800000u) == 0x7f800000u; }
};

struct BFloat16 {
    using type = uint16_t;
    using bits = uint16_t;
    static bits is_special(uint16_t value) { return (value & 0x7f80u) == 0x7f80u; }
    static float load(uint16_t value) { return from_bits(static_cast<uint32_t>(value) << 16); }
};

struct Float16 {
    using type = uint16_t;
    using bits = uint16_t;
    static bits is_special(uint16_t value) { return (value & 0x7c00u) == 0x7c00u; }
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

// Several averages share one loop: the source is loaded once, and all shadows stream from memory at the same time. One
// after the other, block by block, they stay behind the memory's speed (measured: by a quarter for three).
//
// The guard has no branch either, so that the loops are vectorised. A source that is NaN or Inf leaves the shadow as it
// was; a shadow that is NaN or Inf takes a finite source as it is. (A blend of finite values may overflow, and stays.)
// Several averages test the block's source first, in lanes as narrow as its elements, so that the loop tests shadows
// only. One average tests both in its loop. Returns how many sources were not finite.
template <typename Source, bool guarded, bool near, int averages, bool tested>
int64_t blend_all(float *const *shadow, const typename Source::type *__restrict source, int64_t count,
                  const float *coefficient) {
    int32_t skipped = 0;
#pragma omp simd reduction(+ : skipped)
    for (int64_t i = 0; i < count; i++) {
        const float end = Source::load(source[i]);
        const bool skips = guarded && !tested && !is_finite(end);
        for (int k = 0; k < averages; k++) {
            const float start = shadow[k][i];
            const float value = multiply_add(coefficient[k], end - start, near ? start : end);
            const float healed = guarded && !is_finite(start) ? end : value;
            shadow[k][i] = skips ? start : healed;
        }
        skipped += skips;
    }
    return skipped;
}

template <typename Source, bool guarded, bool near, int averages>
int64_t blend(float *const *shadows, const typename Source::type *__restrict source, int64_t count,
              const float *weights) {
    float *shadow[averages];
    float coefficient[averages];
    for (int k = 0; k < averages; k++) {
        shadow[k] = shadows[k];
        coefficient[k] = near ? weights[k] : weights[k] - 1.0f;
    }
    if (!guarded || averages == 1)
        return blend_all<Source, guarded, near, averages, false>(shadow, source, count, coefficient);
    typename Source::bits special = 0;
#pragma omp simd reduction(| : special)
    for (int64_t i = 0; i < count; i++) special |= Source::is_special(source[i]);
    if (special) return blend_all<Source, guarded, near, averages, false>(shadow, source, count, coefficient);
    return blend_all<Source, guarded, near, averages, true>(shadow, source, count, coefficient);
}

// The averages from the first on that can share a loop: those of weights below one half, which torch blends from the
// shadow's end. One of another weight is alone. Sets `taken` to their number.
template <typename Source, bool guarded>
int64_t blend_some(float *const *shadows, const void *given, int64_t low, int64_t count, const float *weights,
                   int64_t averages, int64_t *taken) {
    const auto *source = static_cast<const typename Source::type *>(given) + low;
    const auto is_near = [&](int64_t k) { return (weights[k] < 0 ? -weights[k] : weights[k]) < 0.5f; };
    int64_t together = is_near(0) ? 1 : 0;
    while (together && together < averages && is_near(together)) together++;
    *taken = std::max<int64_t>(together, 1);
    switch (together) {
        case 0: return blend<Source, guarded, false, 1>(shadows, source, count, weights);
        case 1: return blend<Source, guarded, true, 1>(shadows, source, count, weights);
        case 2: return blend<Source, guarded, true, 2>(shadows, source, count, weights);
        case 3: return blend<Source, guarded, true, 3>(shadows, source, count, weights);
        default: return blend<Source, guarded, true, kTogether>(shadows, source, count, weights);
    }
}

template <typename Source>
int64_t blend_some(float *const *shadows, const void *source, int64_t low, int64_t count, const float *weights,
                   int64_t averages, bool guarded, int64_t *taken) {
    return guarded ? blend_some<Source, true>(shadows, source, low, count, weights, averages, taken)
                   : blend_some<Source, false>(shadows, source, low, count, weights, averages, taken);
}

int64_t blend_some(int64_t dtype, float *const *shadows, const void *source, int64_t low, int64_t count,
                   const float *weights, int64_t averages, bool guarded, int64_t *taken) {
    switch (dtype) {
        case 0: return blend_some<Float32>(shadows, source, low, count, weights, averages, guarded, taken);
        case 1: return blend_some<BFloat16>(shadows, source, low, count, weights, averages, guarded, taken);
        default: return blend_some<Float16>(shadows, source, low, count, weights, averages, guarded, taken);
    }
}

// Rounding to bf16 at random: dist_ema/kernels/rounding.py says what and why, and gives the same bits.

inline uint64_t element_key(uint64_t tensor, uint64_t average) {
    uint64_t key = tensor + average;
    key = (key ^ key >> 30) * 0xbf58476d1ce4e5b9u;
    key = (key ^ key >> 27) * 0x94d049bb133111ebu;
    return key ^ key >> 31;
}

inline uint32_t mix(uint32_t bits) {
    bits = (bits ^ bits >> 16) * 0x7feb352du;
    bits = (bits ^ bits >> 15) * 0x846ca68bu;
    return bits ^ bits >> 16;
}

inline uint16_t rounded(float value, uint32_t draw) {
    const uint32_t bits = to_bits(value);
    const uint32_t up = bits + draw;
    const bool keeps = !is_finite(value) || (up & 0x7f800000u) == 0x7f800000u;
    const uint32_t quiet = (bits & 0x7fffffffu) > 0x7f800000u ? 0x40u : 0u;
    return static_cast<uint16_t>(keeps ? bits >> 16 | quiet : up >> 16);
}

// One piece of a run: its elements follow each other in the full tensor too, from `position` on.
template <typename Source>
int64_t blend_rounded(uint16_t *__restrict shadow, const void *given, int64_t count, float weight, bool guarded,
                      int64_t position, uint64_t key) {
    const auto *__restrict source = static_cast<const typename Source::type *>(given);
    const bool near = (weight < 0 ? -weight : weight) < 0.5f;
    const float coefficient = near ? weight : weight - 1.0f;
    const auto first = static_cast<uint32_t>(key), second = static_cast<uint32_t>(key >> 32);
    int32_t skipped = 0;
#pragma omp simd reduction(+ : skipped)
    for (int64_t i = 0; i < count; i++) {
        const uint64_t place = static_cast<uint64_t>(position + i);
        const uint32_t half = mix(static_cast<uint32_t>(place) ^ first);
        const uint32_t draw = mix((half + static_cast<uint32_t>(place >> 32)) ^ second) >> 16;
        const float start = BFloat16::load(shadow[i]);
        const float end = Source::load(source[i]);
        const float blended = multiply_add(coefficient, end - start, near ? start : end);
        const uint16_t value = rounded(guarded && !is_finite(start) ? end : blended, draw);
        const bool skips = guarded && !is_finite(end);
        shadow[i] = skips ? shadow[i] : value;
        skipped += skips;
    }
    return skipped;
}

int64_t blend_rounded(int64_t dtype, uint16_t *shadow, const void *source, int64_t low, int64_t count, float weight,
                      bool guarded, int64_t position, uint64_t key) {
    const auto *wide = static_cast<const float *>(source) + low;
    const auto *narrow = static_cast<const uint16_t *>(source) + low;
    shadow += low;
    switch (dtype) {
        case 0: return blend_rounded<Float32>(shadow, wide, count, weight, guarded, position, key);
        case 1: return blend_rounded<BFloat16>(shadow, narrow, count, weight, guarded, position, key);
        default: return blend_rounded<Float16>(shadow, narrow, count, weight, guarded, position, key);
    }
}

// Everything that one call averages.
// tensors, averages: how many.
// offsets: tensors + 1; where each tensor begins in all of them laid end to end.
// sources: the first element of each; dtypes: 0 for fp32, 1 for bf16, 2 for fp16.
// shadows: the first element of each, average by average: fp32, or bf16 with a rounding. weights: of each average.
// copies: where the first average of an fp32 shadow is also written, in bf16, by the tensor's number in `numbers`; null
// for a tensor without, and altogether where there are none.
struct Lists {
    int64_t tensors, averages;
    const int64_t *offsets;
    const void *const *sources;
    const int64_t *dtypes;
    void *const *shadows;
    const double *weights;
    bool guarded;
    uint16_t *const *copies;
    const int64_t *numbers;
};

// What bf16 shadows are rounded by; the order of the pointers is known to native.py.
// indices: the number of each tensor among those that names and runs are of. keys: of each average, for this update.
// names: hash of each tensor's name. runs: where each tensor's runs begin in locals and fulls, and the end of all.
// locals, fulls: the element of the shadow, and of the full tensor, that each run begins at.
struct Rounding {
    const int64_t *indices;
    const uint64_t *keys, *names;
    const int64_t *runs, *locals, *fulls;
};

// To bf16, to nearest and from halfway to even. A block that was just written is still in the first-level cache.
void narrow(const float *__restrict values, uint16_t *__restrict out, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        const uint32_t bits = to_bits(values[i]);
        const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
        out[i] = static_cast<uint16_t>(is_nan ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    }
}

// Both take up to `most` elements of a tensor from `low` on through all averages, return how many elements that were,
// and add to `skipped` how many of their sources were not finite.

int64_t blend_block(const Lists &all, int64_t tensor, int64_t low, int64_t most, int64_t *skipped) {
    const int64_t count = std::min(kBlock, most);
    for (int64_t average = 0, taken = 0; average < all.averages; average += taken) {
        float *targets[kTogether];
        float parts[kTogether];
        const int64_t left = std::min(kTogether, all.averages - average);
        for (int64_t k = 0; k < left; k++) {
            targets[k] = static_cast<float *>(all.shadows[(average + k) * all.tensors + tensor]) + low;
            parts[k] = static_cast<float>(all.weights[average + k]);
        }
        const int64_t found = blend_some(all.dtypes[tensor], targets, all.sources[tensor], low, count, parts, left,
                                         all.guarded, &taken);
        *skipped += average == 0 ? found : 0;
    }
    if (all.copies && all.copies[all.numbers[tensor]])
        narrow(static_cast<const float *>(all.shadows[tensor]) + low, all.copies[all.numbers[tensor]] + low, count);
    return count;
}

int64_t round_block(const Lists &all, const Rounding &rounding, int64_t tensor, int64_t low, int64_t most,
                    int64_t *skipped) {
    const int64_t index = rounding.indices[tensor];
    const int64_t *first = rounding.locals + rounding.runs[index];
    const int64_t *last = rounding.locals + rounding.runs[index + 1];
    const int64_t *run = std::upper_bound(first, last, low) - 1;
    const int64_t count = std::min({kRoundedBlock, most, run + 1 < last ? run[1] - low : most});
    const int64_t position = rounding.fulls[run - rounding.locals] + low - *run;
    for (int64_t average = 0; average < all.averages; average++) {
        const int64_t found = blend_rounded(
            all.dtypes[tensor], static_cast<uint16_t *>(all.shadows[average * all.tensors + tensor]),
            all.sources[tensor], low, count, static_cast<float>(all.weights[average]), all.guarded, position,
            element_key(rounding.names[index], rounding.keys[average]));
        *skipped += average == 0 ? found : 0;
    }
    return count;
}

}  // namespace

// Averages all lists in one parallel region; threads take chunks of all tensors laid end to end, so that a few large
// tensors, or thousands of small ones, are shared evenly. `given` is a Rounding, or null for fp32 shadows.
// Returns how many source elements were not finite, and therefore skipped; 0 without the guard.
extern "C" int64_t dist_ema_lerp(int64_t tensors, int64_t averages, const int64_t *offsets, const void *const *sources,
                                 const int64_t *dtypes, void *const *shadows, const double *weights, int64_t guarded,
                                 int64_t threads, const void *given, uint16_t *const *copies, const int64_t *numbers) {
    const auto *rounding = static_cast<const Rounding *>(given);
    const Lists all{tensors, averages, offsets, sources, dtypes, shadows, weights, guarded != 0, copies, numbers};
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
            const int64_t most = std::min(stop, offsets[tensor + 1]) - position;
            int64_t found = 0;
            position += rounding ? round_block(all, *rounding, tensor, low, most, &found)
                                 : blend_block(all, tensor, low, most, &found);
            skipped += found;
            while (position < stop && position >= offsets[tensor + 1]) tensor++;  // empty tensors too
        }
    }
    return skipped;
}
