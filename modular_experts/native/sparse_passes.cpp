// Passes over the entries of sparse deltas: what torch does in several, with a copy between each two, is done in one.
//
// Places are sorted flat entries of a weight; a part of it begins with the entry `start` and has `size`. Places that
// are not sorted, or not in the part, are never written to: the functions then return 1, else 0. There is one thread,
// and products are rounded before they are added (-ffp-contract=off), so that the bits are those of torch.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t TILE = 1 << 13;  // entries that all experts go through before the next: they stay in the cache

// Set `out`, and `kept` if it is there, to zero, call `each(expert)(number, entry of the part)` for all entries - at
// each place the experts come in their order - and set those of `kept` to 1. Then `out` is multiplied by a factor.
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

// Sum the values, times the weight of their expert if there are weights, and multiply the sum by a factor; tell what
// any expert keeps, by a 1.
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

// Count the experts that keep each entry; with values, those whose value is not zero.
extern "C" int count_entries(const int32_t* const* places, const float* const* values, const int64_t* counts,
                             int64_t experts, int64_t start, int64_t size, double* out) {
    if (!values)
        return over(places, counts, experts, start, size, out, nullptr, 1,
                    [=](int64_t) { return [=](int64_t, int64_t entry) { out[entry]++; }; });
    return over(places, counts, experts, start, size, out, nullptr, 1, [=](int64_t expert) {
        return [=, own = values[expert]](int64_t k, int64_t entry) { out[entry] += own[k] != 0; };
    });
}

// Write the places of what is kept of a part, and its values; return how many. Both have room for the whole part.
extern "C" int64_t pack_entries(const double* total, const uint8_t* kept, int64_t size, int64_t start, int32_t* places,
                                float* values) {
    int64_t count = 0;
    for (int64_t entry = 0; entry < size; entry++) {  // written always, and kept by going on: there is nothing to guess
        places[count] = static_cast<int32_t>(start + entry);
        values[count] = static_cast<float>(total[entry]);
        count += kept[entry] != 0;
    }
    return count;
}

// Write the numbers that gaps stand for; return the last (-1 if there is none), or -2 if there are not `count`.
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

// Write the numbers of the bits that a mask sets, the lowest bit of a byte first; return what decode_gaps does.
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

// Write the flat entries of sorted tiles of a weight `(rows, columns)`, in their order, and their values; return how
// many: what lies beyond the edge is left out. Both have room for all entries of the tiles.
extern "C" int64_t spread_tiles(const int32_t* blocks, const float* tiles, int64_t count, int64_t height, int64_t width,
                                int64_t rows, int64_t columns, int32_t* places, float* values) {
    const int64_t wide = (columns + width - 1) / width;
    int64_t found = 0;
    for (int64_t first = 0, last = 0; first < count; first = last) {
        const int64_t row = blocks[first] / wide;  // of the grid; its tiles share rows of the weight
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

// Add values to a weight in bfloat16: each sum is taken in float32 and rounded once, to the nearest (of two, even).
// Also counted are the values that are not zero and the entries whose bits change, and summed the squares of what
// rounding took away and of the values.
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
