// shadow += weight * (source - shadow) over lists of tensors, for several averages at once, in one parallel region.
//
//   dist_ema_lerp     threads take chunks of kChunk elements of all tensors laid end to end
//     blend_block     fp32 shadows: kBlock elements of one tensor, through all averages
//       blend_some    up to kTogether averages in one loop
//     round_block     bf16 shadows: up to kRoundedBlock elements of one run, one average after the other
//       blend_rounded
//
// Compiled on first use and loaded with ctypes. It includes no torch headers, so compiling takes seconds.
// The arithmetic is that of torch.lerp on the CPU, bit for bit: one subtraction and one fused multiply-add, from the
// nearer end. Never compile it with -ffast-math: it would drop the tests for NaN and Inf.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

// Elements that a thread takes at a time. Few enough that a thread that loses its core does not keep the others
// waiting at the end.
constexpr int64_t kChunk = 1 << 16;
// Elements that go through all averages before the next ones, so that the source stays in the first-level cache.
constexpr int64_t kBlock = 1 << 9;
// The same for bf16 shadows. It is larger because each block has to find its run and key first.
constexpr int64_t kRoundedBlock = 1 << 11;
// The largest number of averages that share one loop.
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

// a * b + c, rounded once if torch does so on this processor. compiler.py sets DIST_EMA_NO_FMA if torch uses its
// kernels without vector instructions, which round twice.
inline float multiply_add(float a, float b, float c) {
#if !defined(DIST_EMA_NO_FMA) && (defined(__FMA__) || defined(__FP_FAST_FMAF) || defined(__aarch64__))
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// The dtypes of sources. load() converts to fp32; is_special() is nonzero for NaN and Inf, whose exponent has all bits
// set, and has the width of the element, so that a loop over it fills whole vectors.
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

// Several averages share one loop: the source is loaded once, and all shadows stream from memory at the same time.
// Computing one average after the other, block by block, is slower than the memory (measured: by a quarter for three).
//
// The guard selects values instead of branching, so that the loops are vectorized. If a source is NaN or Inf, the
// shadow keeps its value. If a shadow is NaN or Inf, it takes a finite source unchanged. (A blend of finite values may
// overflow; that is not repaired.) For several averages the sources of a block are tested before the loop (`tested`),
// which then tests only shadows. One average tests both in its loop.
//
// near: the weight is below one half. torch.lerp then computes start + weight * (end - start), and otherwise
// end + (weight - 1) * (end - start), which is exact at a weight of 1.
//
// Returns how many sources were not finite.
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

// Prepares the coefficients of blend_all, and chooses its variant. Returns how many sources were not finite.
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
    // One test of the whole block; nearly all blocks are finite.
    typename Source::bits special = 0;
#pragma omp simd reduction(| : special)
    for (int64_t i = 0; i < count; i++) special |= Source::is_special(source[i]);
    if (special) return blend_all<Source, guarded, near, averages, false>(shadow, source, count, coefficient);
    return blend_all<Source, guarded, near, averages, true>(shadow, source, count, coefficient);
}

// Blends the first averages of the list that can share a loop: those whose weights are below one half. An average with
// a larger weight has a loop of its own. Sets `taken` to the number of averages that were blended.
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

// Stochastic rounding to bf16. rounding.py explains it, and computes the same bits.

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

// Rounds to bf16. Adding 16 random bits to the 16 bits that will be cut off carries with the probability that these
// stand for. NaN and Inf are only cut, and so is a finite value that would become Inf.
inline uint16_t rounded(float value, uint32_t draw) {
    const uint32_t bits = to_bits(value);
    const uint32_t up = bits + draw;
    const bool keeps = !is_finite(value) || (up & 0x7f800000u) == 0x7f800000u;
    const uint32_t quiet = (bits & 0x7fffffffu) > 0x7f800000u ? 0x40u : 0u;  // keeps a NaN from being cut to Inf
    return static_cast<uint16_t>(keeps ? bits >> 16 | quiet : up >> 16);
}

// Blends and rounds a part of one run: `count` elements that are contiguous in the full tensor, too, from `position`
// on. Returns how many sources were not finite.
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

// The arguments of one call.
// tensors, averages: their numbers.
// offsets: tensors + 1 values; where each tensor begins if all are laid end to end, and the end.
// sources: the address of each source. dtypes: 0 for fp32, 1 for bf16, 2 for fp16.
// shadows: the address of each shadow, average by average; fp32, or bf16 with a rounding.
// weights: the weight of each average.
// copies: addresses of bf16 tensors that also receive the first average, indexed by `numbers`; null for a tensor
// without a copy, and a null pointer if no tensor has one.
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

// The rounding of bf16 shadows. native.py writes these pointers in this order.
// indices: the index of each tensor in names and runs. keys: the key of each average for this update.
// names: the hash of each tensor's name.
// runs: the index in locals and fulls of each tensor's first run, and the number of all runs.
// locals, fulls: the first element of each run in the shadow, and in the full tensor.
struct Rounding {
    const int64_t *indices;
    const uint64_t *keys, *names;
    const int64_t *runs, *locals, *fulls;
};

// Converts to bf16, rounding to nearest, and to even if halfway. The block was just written, so it is still in the
// first-level cache.
void narrow(const float *__restrict values, uint16_t *__restrict out, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        const uint32_t bits = to_bits(values[i]);
        const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
        out[i] = static_cast<uint16_t>(is_nan ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    }
}

// blend_block and round_block average up to `most` elements of a tensor, from `low` on. They return the number of
// elements, and add the number of sources that were not finite to `skipped`.

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
        *skipped += average == 0 ? found : 0;  // each source is counted once, not once for each average
    }
    if (all.copies && all.copies[all.numbers[tensor]])
        narrow(static_cast<const float *>(all.shadows[tensor]) + low, all.copies[all.numbers[tensor]] + low, count);
    return count;
}

int64_t round_block(const Lists &all, const Rounding &rounding, int64_t tensor, int64_t low, int64_t most,
                    int64_t *skipped) {
    // Find the run that contains element `low`. The block ends with it, because the next run has other positions.
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

// Averages all lists in one parallel region. Threads take chunks of all tensors laid end to end, so that a few large
// tensors, or thousands of small ones, are shared evenly:
//
//     tensors   | 0                | 1 | 2 |          3          |
//     chunks    |    0    |    1    |    2    |    3    |    4   |
//
// `given` is a Rounding, or null for fp32 shadows. Returns how many source elements were not finite, and were skipped;
// 0 without the guard.
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
        // The tensor that contains the first element of the chunk.
        int64_t tensor = std::upper_bound(offsets, offsets + tensors + 1, position) - offsets - 1;
        while (position < stop) {
            const int64_t low = position - offsets[tensor];
            const int64_t most = std::min(stop, offsets[tensor + 1]) - position;
            int64_t found = 0;
            position += rounding ? round_block(all, *rounding, tensor, low, most, &found)
                                 : blend_block(all, tensor, low, most, &found);
            skipped += found;
            while (position < stop && position >= offsets[tensor + 1]) tensor++;  // also passes over empty tensors
        }
    }
    return skipped;
}
