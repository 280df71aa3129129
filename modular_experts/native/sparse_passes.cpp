// Passes over the entries of sparse deltas. Torch needs several passes with a copy after each; these loops need one.
//
// Places are sorted flat entries of a weight. A part of a weight begins with the entry `start` and has `size` entries.
// The functions never write to a place that is not sorted or not in the part: they stop and return 1 (else 0). They use
// one thread and round products before they add them (-ffp-contract=off), so that the bits are those of torch.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t TILE = 1 << 13;  // entries that stay in the cache while every expert adds to them

// Set `out` and `kept`, unless it is null, to zero. Call `each(expert)(number, entry of the part)` for every entry of
// every expert, in the order of the experts at each place, and set that entry of `kept` to 1. In the end multiply `out`
// by the factor.
template <class Each>
int over(const int32_t* const* places, const int64_t* counts, int64_t experts, int64_t start, int64_t size, double* out,
         uint8_t* kept, double factor, Each each) {
    std::vector<int64_t> done(experts);
    for (int64_t tile = 0; tile < size; tile += TILE) {
        const int64_t end = std::min(tile + TILE, size);
        std::fill(out + tile, out + end, 0.0);
        if (kept) std::fill(kept + tile, kept + end, uint8_t{0});
        for (int64_t expert = 0; expert < experts; expert++) {
            const int32_t* own = places[expert];
            const int64_t count = counts[expert];
            const auto here = each(expert);
            int64_t k = done[expert];
            for (; k < count && own[k] < start + end; k++) {
                const int64_t entry = own[k] - start;
                if (entry < tile) return 1;
                here(k, entry);
                if (kept) kept[entry] = 1;
            }
            done[expert] = k;
        }
        for (int64_t entry = tile; factor != 1 && entry < end; entry++) out[entry] *= factor;
    }
    for (int64_t expert = 0; expert < experts; expert++)
        if (done[expert] < counts[expert]) return 1;
    return 0;
}

float widened(uint16_t half) {
    const uint32_t bits = uint32_t{half} << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

uint16_t narrowed(float wide) {
    uint32_t bits;
    std::memcpy(&bits, &wide, 4);
    const uint16_t rounded = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    return wide == wide ? rounded : 0x7fc0;  // NaN
}

}  // namespace

// Sum the values, each times the weight of its expert if there are weights, and multiply the sum by a factor. Set
// `kept` to 1 where any expert keeps an entry.
extern "C" int sum_entries(const int32_t* const* places, const float* const* values, const int64_t* counts,
                           int64_t experts, const double* weights, double factor, int64_t start, int64_t size,
                           double* out, uint8_t* kept) {
    if (!weights)
        return over(places, counts, experts, start, size, out, kept, factor, [=](int64_t expert) {
            return [=, own = values[expert]](int64_t k, int64_t entry) { out[entry] += own[k]; };
        });
    return over(places, counts, experts, start, size, out, kept, factor, [=](int64_t expert) {
        return [=, own = values[expert], weight = weights[expert]](int64_t k, int64_t entry) {
            out[entry] += weight * own[k];
        };
    });
}

// Count the experts that keep each entry. If there are values, count only the experts whose value is not zero.
extern "C" int count_entries(const int32_t* const* places, const float* const* values, const int64_t* counts,
                             int64_t experts, int64_t start, int64_t size, double* out) {
    if (!values)
        return over(places, counts, experts, start, size, out, nullptr, 1,
                    [=](int64_t) { return [=](int64_t, int64_t entry) { out[entry]++; }; });
    return over(places, counts, experts, start, size, out, nullptr, 1, [=](int64_t expert) {
        return [=, own = values[expert]](int64_t k, int64_t entry) { out[entry] += own[k] != 0; };
    });
}

// Write the places and values of the kept entries of a part, and return their number. Both outputs need room for the
// whole part.
extern "C" int64_t pack_entries(const double* total, const uint8_t* kept, int64_t size, int64_t start, int32_t* places,
                                float* values) {
    int64_t count = 0;
    for (int64_t entry = 0; entry < size; entry++) {  // no branch to predict: an entry is always written
        places[count] = static_cast<int32_t>(start + entry);
        values[count] = static_cast<float>(total[entry]);
        count += kept[entry] != 0;
    }
    return count;
}

// Write the numbers that the gaps encode. Return the last one (-1 for an empty list), or -2 if there are not `count`.
extern "C" int64_t decode_gaps(const uint8_t* gaps, int64_t bytes, int64_t count, int32_t* numbers) {
    int64_t last = -1, found = 0;
    for (int64_t k = 0; k < bytes; k++) {
        last += gaps[k] ? gaps[k] : 255;
        if (!gaps[k]) continue;
        if (found == count) return -2;
        numbers[found++] = static_cast<int32_t>(last);
    }
    return found == count && (!bytes || gaps[bytes - 1]) ? last : -2;
}

// Write the numbers of the bits that a mask sets, the lowest bit of a byte first. Return what decode_gaps returns.
extern "C" int64_t decode_mask(const uint8_t* mask, int64_t bytes, int64_t count, int32_t* numbers) {
    int64_t last = -1, found = 0;
    for (int64_t place = 0; place < bytes; place += 8) {
        uint64_t bits = 0;
        for (int64_t k = 0; k < std::min<int64_t>(8, bytes - place); k++) bits |= uint64_t{mask[place + k]} << 8 * k;
        if (found + __builtin_popcountll(bits) > count) return -2;
        for (; bits; bits &= bits - 1) {
            last = 8 * place + __builtin_ctzll(bits);
            numbers[found++] = static_cast<int32_t>(last);
        }
    }
    return found == count ? last : -2;
}

// Write the flat entries of sorted tiles of a weight `(rows, columns)`, in ascending order, and their values. Leave out
// entries beyond the edge, and return how many were written. Both outputs need room for all entries of the tiles.
extern "C" int64_t spread_tiles(const int32_t* blocks, const float* tiles, int64_t count, int64_t height, int64_t width,
                                int64_t rows, int64_t columns, int32_t* places, float* values) {
    const int64_t wide = (columns + width - 1) / width;
    int64_t found = 0;
    for (int64_t first = 0, last = 0; first < count; first = last) {
        const int64_t row = blocks[first] / wide;  // the tiles in one row of the grid share rows of the weight
        while (last < count && blocks[last] / wide == row) last++;
        for (int64_t k = 0; k < height && row * height + k < rows; k++)
            for (int64_t tile = first; tile < last; tile++) {
                const int64_t column = blocks[tile] % wide * width, here = std::min(width, columns - column);
                const int64_t place = (row * height + k) * columns + column;
                const float* own = tiles + (tile * height + k) * width;
                for (int64_t j = 0; j < here; j++) places[found + j] = static_cast<int32_t>(place + j);
                for (int64_t j = 0; j < here; j++) values[found + j] = own[j];
                found += here;
            }
    }
    return found;
}

// Add values to a bfloat16 weight: compute each sum in float32 and round it once, to the nearest number, ties to even.
// Count the values that are not zero and the entries whose bits change. Sum the squared rounding errors and the squares
// of the values.
extern "C" int add_rounded(const int32_t* places, const float* values, int64_t count, int64_t size, uint16_t* weight,
                           int64_t* counts, double* squares) {
    int64_t moved = 0, changed = 0;
    double lost = 0, norm = 0;
    for (int64_t k = 0; k < count; k++) {
        const uint64_t entry = static_cast<uint64_t>(static_cast<int64_t>(places[k]));
        if (entry >= static_cast<uint64_t>(size)) return 1;
        const float exact = widened(weight[entry]) + values[k];
        const uint16_t rounded = narrowed(exact);
        const double error = double{widened(rounded)} - exact;
        moved += values[k] != 0, changed += rounded != weight[entry];
        lost += error * error, norm += double{values[k]} * values[k];
        weight[entry] = rounded;
    }
    counts[0] = moved, counts[1] = changed;
    squares[0] = lost, squares[1] = norm;
    return 0;
}

// Return how many scores are at or above the bound, or -1 if one is not a number.
extern "C" int64_t count_at_least(const float* scores, int64_t size, float bound) {
    int64_t count = 0;
    int unordered = 0;
    for (int64_t first = 0; first < size; first += TILE) {
        const int64_t last = std::min(first + TILE, size);
        int32_t here = 0;  // narrow, so that the compiler uses vectors
        for (int64_t i = first; i < last; i++) {
            here += scores[i] >= bound;
            unordered |= scores[i] != scores[i];
        }
        count += here;
    }
    return unordered ? -1 : count;
}

// Write the places of the scores at or above the bound, in order; `places` has room for one more than there are.
extern "C" void find_at_least(const float* scores, int64_t size, float bound, int32_t* places) {
    int64_t count = 0;
    for (int64_t i = 0; i < size; i++) {
        places[count] = static_cast<int32_t>(i);  // without a branch, which would be mispredicted at one of ten
        count += scores[i] >= bound;
    }
}

// Write for each of the sorted numbers `after` its place among the sorted numbers `before`, or -1.
extern "C" void find_sorted(const int32_t* before, int64_t held, const int32_t* after, int64_t count, int64_t* slots) {
    int64_t slot = 0;
    for (int64_t i = 0; i < count; i++) {
        while (slot < held && before[slot] < after[i]) slot++;
        slots[i] = slot < held && before[slot] == after[i] ? slot : -1;
    }
}
