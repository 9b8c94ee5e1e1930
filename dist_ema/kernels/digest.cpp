// Computes a rank's part of a digest that does not depend on the sharding. fingerprint.py explains the formula.
//
// Compiled on first use, together with fused.cpp, and loaded with ctypes.

#include <algorithm>
#include <cstdint>

namespace {

// The keys of a block of this many elements have a common factor. These two values must be those of fingerprint.py.
constexpr int64_t kBlock = 1 << 16;
constexpr uint64_t kSalt = 0x5851F42D4C957F2D;

// SplitMix64's finalizer (Steele, Lea, Flood 2014).
uint64_t mix(uint64_t value) {
    value += 0x9E3779B97F4A7C15;
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB;
    return value ^ (value >> 31);
}

// Returns the sum of values[i] * keys[i] modulo 2**64. The bits are widened as integers of their own type, which is
// signed for two bytes and more.
template <typename Bits>
uint64_t sum(const Bits *__restrict values, const uint64_t *__restrict keys, int64_t count) {
    uint64_t total = 0;
    for (int64_t i = 0; i < count; i++) total += static_cast<uint64_t>(static_cast<int64_t>(values[i])) * keys[i];
    return total;
}

// Goes through the runs block by block, because each block has its own factor.
template <typename Bits>
uint64_t digest(const Bits *values, const int64_t *runs, int64_t count, const uint64_t *keys) {
    uint64_t total = 0;
    for (int64_t run = 0; run < count; run++) {
        int64_t position = runs[2 * run];
        const int64_t stop = position + runs[2 * run + 1];
        while (position < stop) {
            const int64_t inside = position % kBlock;
            const int64_t size = std::min(kBlock - inside, stop - position);
            const uint64_t factor = mix(static_cast<uint64_t>(position / kBlock) ^ kSalt) | 1;
            total += sum(values, keys + inside, size) * factor;
            values += size;
            position += size;
        }
    }
    return total;
}

}  // namespace

// values: the elements of all runs, contiguous, each of `width` bytes: 1, 2, 4 or 8.
// runs: `count` pairs: the position of a run's first element in the full tensor, and the number of its elements.
// keys: the key of each place inside a block; kBlock values.
extern "C" uint64_t dist_ema_digest(const void *values, int64_t width, const int64_t *runs, int64_t count,
                                    const uint64_t *keys) {
    switch (width) {
        case 1: return digest(static_cast<const uint8_t *>(values), runs, count, keys);
        case 2: return digest(static_cast<const int16_t *>(values), runs, count, keys);
        case 4: return digest(static_cast<const int32_t *>(values), runs, count, keys);
        default: return digest(static_cast<const int64_t *>(values), runs, count, keys);
    }
}
