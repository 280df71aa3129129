// Passes over the entries of sparse deltas. Torch needs several passes with a copy after each; these loops need one.
//
// Places are sorted flat entries of a weight. A part of a weight begins with the entry `start` and has `size` entries.
// The functions never write to a place that is not sorted or not in the part: they stop and return 1 (else 0). They use
// one thread and round products before they add them (-ffp-contract=off), so that the bits are those of torch.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t TILE = 1 << 12;  // entries that stay in the fastest cache while every expert adds to them

#ifdef __AVX512F__
__m512i running_sums(__m512i own) {
    const __m512i none = _mm512_setzero_si512();
    own = _mm512_add_epi32(own, _mm512_alignr_epi32(own, none, 15));
    own = _mm512_add_epi32(own, _mm512_alignr_epi32(own, none, 14));
    own = _mm512_add_epi32(own, _mm512_alignr_epi32(own, none, 12));
    return _mm512_add_epi32(own, _mm512_alignr_epi32(own, none, 8));
}

int32_t last_of(__m512i numbers) { return _mm_extract_epi32(_mm512_extracti32x4_epi32(numbers, 3), 3); }

const __m512i UP = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#endif

// Call `begin(tile, end)` for each tile of a part, then `each(expert)(number, entry of the part)` for the entries that
// each expert keeps there, in the order of the experts at each place, and then `finish(tile, end)`.
template <class Begin, class Each, class Finish>
int over(const int32_t* const* places, const float* const* values, const int64_t* counts, int64_t experts, int64_t start, int64_t size, Begin begin,
         Each each, Finish finish) {
    std::vector<int64_t> done(experts);
    for (int64_t tile = 0; tile < size; tile += TILE) {
        const int64_t end = std::min(tile + TILE, size);
        begin(tile, end);
        for (int64_t expert = 0; expert < experts; expert++) {
            const int32_t* own = places[expert];
            const int64_t first = done[expert], most = std::min(counts[expert], first + end - tile);
            const int64_t last = std::lower_bound(own + first, own + most, start + end) - own;
            int32_t lowest = INT32_MAX, highest = INT32_MIN;  // all are looked at before any is written to
            for (int64_t k = first; k < last; k++) {
                lowest = std::min(lowest, own[k]);
                highest = std::max(highest, own[k]);
            }
            if (first < last && (lowest < start + tile || highest >= start + end)) return 1;
            if (expert + 1 < experts)  // runs are too short for the processor to foresee what it will read
                for (int64_t k = done[expert + 1]; k < done[expert + 1] + 256; k += 16) {
                    __builtin_prefetch(places[expert + 1] + k);
                    if (values) __builtin_prefetch(values[expert + 1] + k);
                }
            const auto here = each(expert);
            for (int64_t k = first; k < last; k++) here(k, own[k] - start);
            done[expert] = last;
        }
        finish(tile, end);
    }
    for (int64_t expert = 0; expert < experts; expert++)
        if (done[expert] < counts[expert]) return 1;
    return 0;
}

// Call `over` with sums of the values, each times the weight of its expert. Sums and marks of an entry lie
// `offset(tile)` beyond its place in the part.
template <class Offset, class Finish>
int sums(const int32_t* const* places, const float* const* values, const int64_t* counts, int64_t experts,
         const double* weights, double factor, int64_t start, int64_t size, double* out, uint8_t* kept, Offset offset,
         Finish finish) {
    int64_t away = 0;
    const auto begin = [&](int64_t tile, int64_t end) {
        away = offset(tile);
        std::fill(out + tile + away, out + end + away, 0.0);
        std::fill(kept + tile + away, kept + end + away, uint8_t{0});
    };
    const auto scaled = [&](int64_t tile, int64_t end) {
        for (int64_t entry = tile + away; factor != 1 && entry < end + away; entry++) out[entry] *= factor;
        finish(tile, end);
    };
    return over(places, values, counts, experts, start, size, begin, [&](int64_t expert) {
        return [own = values[expert], weight = weights[expert], to = out + away, mark = kept + away](
                   int64_t k, int64_t entry) {
            to[entry] += weight * own[k];
            mark[entry] = 1;
        };
    }, scaled);
}

// Write the places and values of the kept ones of `size` entries, the first of which has the place `start`, and return
// their number. Both outputs need room for all entries.
int64_t pack(const double* total, const uint8_t* kept, int64_t size, int64_t start, int32_t* places, float* values) {
    int64_t count = 0, entry = 0;
#ifdef __AVX512F__
    for (; entry + 16 <= size; entry += 16) {
        const __m512i marks = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kept + entry)));
        const __mmask16 mask = _mm512_test_epi32_mask(marks, marks);
        const __m256 low = _mm512_cvtpd_ps(_mm512_loadu_pd(total + entry));
        const __m256 high = _mm512_cvtpd_ps(_mm512_loadu_pd(total + entry + 8));
        const __m512d both = _mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_castps_pd(low)), _mm256_castps_pd(high), 1);
        const __m512i place = _mm512_add_epi32(UP, _mm512_set1_epi32(static_cast<int32_t>(start + entry)));
        _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(mask, _mm512_castpd_ps(both)));
        _mm512_storeu_si512(places + count, _mm512_maskz_compress_epi32(mask, place));
        count += __builtin_popcount(mask);
    }
#endif
    for (; entry < size; entry++) {  // no branch to predict: an entry is always written
        places[count] = static_cast<int32_t>(start + entry);
        values[count] = static_cast<float>(total[entry]);
        count += kept[entry] != 0;
    }
    return count;
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

// Return the number, k or more, of the first of the sorted `places` that is not below a bound.
int64_t first_from(int64_t bound, const int32_t* places, int64_t k, int64_t count) {
    for (int64_t below = LANES; below == LANES && k + LANES <= count; k += below) {
        below = 0;
        for (int64_t j = 0; j < LANES; j++) below += places[k + j] < bound;
    }
    while (k < count && places[k] < bound) k++;
    return k;
}

// Spread the bits of a byte over eight bytes, the lowest first.
uint64_t spread(uint8_t byte) {
    const uint64_t bits = byte * 0x0101010101010101u & 0x8040201008040201u;  // bit j alone in byte j
    return (bits + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
}

// The codes of planes of bits, read from the first to the last, some at a time so that they stay in the fastest cache.
struct Codes {
    const uint8_t* planes;
    int64_t bits, count, stride = (count + 7) / 8, first = 0, end = 0;  // of the codes that have been read now
    uint8_t codes[TILE + LANES] = {};  // vectors may reach beyond the end
    const uint8_t* at(int64_t k) const { return codes + (k - first); }
    void read_more() {
        first = end, end = std::min(first + TILE, count);
        int64_t byte = first / 8;
#ifdef __AVX512BW__
        for (; byte + 8 <= std::min(stride, first / 8 + TILE / 8); byte += 8) {
            __m512i all = _mm512_setzero_si512();
            for (int64_t bit = 0; bit < bits; bit++) {
                uint64_t mask;
                std::memcpy(&mask, planes + bit * stride + byte, 8);
                all = _mm512_or_si512(all, _mm512_maskz_set1_epi8(mask, static_cast<char>(1 << bit)));
            }
            _mm512_storeu_si512(codes + 8 * byte - first, all);
        }
#endif
        for (; 8 * byte < end; byte++) {
            uint64_t eight = 0;
            for (int64_t bit = 0; bit < bits; bit++) eight |= spread(planes[bit * stride + byte]) << bit;
            std::memcpy(codes + 8 * byte - first, &eight, 8);
        }
    }
};

}  // namespace

// Sum the values, each times the weight of its expert, and multiply the sum by a factor. Set `kept` to 1 where any
// expert keeps an entry.
extern "C" int sum_entries(const int32_t* const* places, const float* const* values, const int64_t* counts,
                           int64_t experts, const double* weights, double factor, int64_t start, int64_t size,
                           double* out, uint8_t* kept) {
    const auto in_place = [](int64_t) { return int64_t{0}; };
    const auto nothing = [](int64_t, int64_t) {};
    return sums(places, values, counts, experts, weights, factor, start, size, out, kept, in_place, nothing);
}

// Do what sum_entries and then pack_entries do for a whole weight, without room for the sums of more than a tile.
// Return the number of the kept entries, or -1 where sum_entries returns 1.
extern "C" int64_t sum_and_pack(const int32_t* const* places, const float* const* values, const int64_t* counts,
                                int64_t experts, const double* weights, double factor, int64_t size,
                                int32_t* packed_places, float* packed_values) {
    std::vector<double> out(TILE);
    std::vector<uint8_t> kept(TILE);
    int64_t count = 0;
    const auto first = [](int64_t tile) { return -tile; };
    const auto packing = [&](int64_t tile, int64_t end) {
        count += pack(out.data(), kept.data(), end - tile, tile, packed_places + count, packed_values + count);
    };
    const int outside = sums(places, values, counts, experts, weights, factor, 0, size, out.data(), kept.data(), first,
                             packing);
    return outside ? -1 : count;
}

// Count the experts that keep each entry. If there are values, count only the experts whose value is not zero.
extern "C" int count_entries(const int32_t* const* places, const float* const* values, const int64_t* counts,
                             int64_t experts, int64_t start, int64_t size, double* out) {
    const auto begin = [=](int64_t tile, int64_t end) { std::fill(out + tile, out + end, 0.0); };
    const auto nothing = [](int64_t, int64_t) {};
    return over(places, values, counts, experts, start, size, begin, [=](int64_t expert) {
        const float* own = values ? values[expert] : nullptr;
        return [=](int64_t k, int64_t entry) { out[entry] += !own || own[k] != 0; };
    }, nothing);
}

// Write the places and values of the kept entries of a part, and return their number. Both outputs need room for the
// whole part.
extern "C" int64_t pack_entries(const double* total, const uint8_t* kept, int64_t size, int64_t start, int32_t* places,
                                float* values) {
    return pack(total, kept, size, start, places, values);
}

// Write the numbers that gaps encode. Return the last one (-1 for an empty list), or -2 if there are not `count`.
extern "C" int64_t decode_gaps(const uint8_t* gaps, int64_t bytes, int64_t count, int32_t* numbers) {
    int64_t last = -1, found = 0;
    for (int64_t k = 0; k < bytes; k++) {
#ifdef __AVX512F__
        while (k + 16 <= bytes && found + 16 <= count) {  // sixteen gaps, if no byte of them is zero
            const __m512i own = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(gaps + k)));
            if (_mm512_testn_epi32_mask(own, own)) break;
            const __m512i sums = running_sums(own);
            _mm512_storeu_si512(numbers + found, _mm512_add_epi32(sums, _mm512_set1_epi32(static_cast<int32_t>(last))));
            last += last_of(sums);
            found += 16, k += 16;
        }
        if (k == bytes) break;
#endif
        last += gaps[k] ? gaps[k] : 255;
        if (!gaps[k]) continue;
        if (found == count) return -2;
        numbers[found++] = static_cast<int32_t>(last);
    }
    return found == count && (!bytes || gaps[bytes - 1]) ? last : -2;
}

// Write the numbers of the bits that a mask sets, the lowest bit of a byte first. Return what decode_gaps returns.
extern "C" int64_t decode_mask(const uint8_t* mask, int64_t bytes, int64_t count, int32_t* numbers) {
    int64_t last = -1, found = 0, place = 0;
#ifdef __AVX512F__
    for (; place + 2 <= bytes && found + 16 <= count; place += 2) {
        const uint32_t bits = mask[place] | mask[place + 1] << 8;
        const __m512i own = _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), UP);
        _mm512_storeu_si512(numbers + found, _mm512_add_epi32(own, _mm512_set1_epi32(static_cast<int32_t>(8 * place))));
        found += __builtin_popcount(bits);
        if (bits) last = 8 * place + 31 - __builtin_clz(bits);
    }
#endif
    for (; place < bytes; place += 8) {
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

// Write the numbers that a Rice code stands for (`library/packing.py`). Return what decode_gaps returns.
extern "C" int64_t decode_rice(const uint8_t* rice, int64_t bytes, int64_t count, int32_t* numbers) {
    const int64_t low = rice[0], start = 1 + low * ((count + 7) / 8);
    if (low > 8 || start >= bytes) return -2;
    const int64_t end = decode_mask(rice + start, bytes - start, count, numbers);
    if (end < 0) return end;
    Codes codes{rice + 1, low, count};
    int64_t sum = 0;  // of the low bits, and of a one for each number
    for (int64_t k = 0; k < count;) {
        codes.read_more();
#ifdef __AVX512F__
        for (; k + 16 <= codes.end; k += 16) {
            const __m512i own = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes.at(k))));
            const __m512i sums = running_sums(_mm512_add_epi32(own, _mm512_set1_epi32(1)));
            const __m512i before = _mm512_add_epi32(UP, _mm512_set1_epi32(static_cast<int32_t>(k)));
            const __m512i quotients = _mm512_sub_epi32(_mm512_loadu_si512(numbers + k), before);
            const __m512i high = _mm512_sll_epi32(quotients, _mm_cvtsi64_si128(low));
            const __m512i base = _mm512_set1_epi32(static_cast<int32_t>(sum - 1));
            _mm512_storeu_si512(numbers + k, _mm512_add_epi32(_mm512_add_epi32(high, sums), base));
            sum += last_of(sums);
        }
#endif
        for (; k < codes.end; k++) {
            sum += *codes.at(k) + 1;
            numbers[k] = static_cast<int32_t>(((int64_t{numbers[k]} - k) << low) + sum - 1);
        }
    }
    return ((end - count + 1) << low) + sum - 1;
}

// Write the values that codes of `bits` bits stand for; `deltas/encodings.py` has the encodings. A row has one scale, or
// several `magnitudes`. `values` are entries at the sorted places `kept`, whose row is the place over `width`, where
// `height` is 0; else tiles of `height` and `width` with the numbers `kept` in a grid of `wide` columns, where entries
// beyond the right edge of the `columns` of the weight belong to the last row; without `kept` they are one tile, whose
// columns have scales instead of its rows where `height` is below 0. Return 1 where a value has no row or might not be
// finite, else 0.
extern "C" int decode_values(const uint8_t* planes, int64_t bits, int64_t count, const uint16_t* scales, int64_t rows,
                             int64_t magnitudes, const int32_t* kept, int64_t height, int64_t width, int64_t wide,
                             int64_t columns, float* values) {
    Codes codes{planes, bits, count};
    const int64_t each = 2 * std::max<int64_t>(magnitudes, 1);
    const int top = (1 << (bits - 1)) - 1;
    std::vector<float> tables(rows * each);  // magnitudes of each row with a sign, which is the lowest bit of a code
    for (int64_t k = 0; k < rows * each; k++) {
        const float scale = widened(scales[k / 2]);
        if (!(std::abs(scale) < 1e36f)) return 1;
        tables[k] = k % 2 ? scale : -scale;
    }
    const auto write = [&](int64_t from, int64_t to, int64_t row, auto step) {  // to the next row after each value, or not
        if (row < 0 || row + step * (to - from - 1) >= rows) return false;
        for (const float* __restrict table = tables.data() + row * each; from < to;) {
            if (from == codes.end) codes.read_more();
            const uint8_t* __restrict own = codes.at(from);
            float* __restrict out = values + from;
            const int64_t some = std::min(to, codes.end) - from;
            const auto value = [&](int64_t k) {
                return magnitudes ? table[step * k * each + own[k]] : static_cast<float>(own[k] - top) * table[step * k * 2 + 1];
            };
            int64_t k = 0;
            if (step == 0)  // the last vector of a run may reach into the next run, which is written later
                for (; k < some && from + k + LANES <= count; k += LANES)
                    for (int64_t j = k; j < k + LANES; j++) out[j] = value(j);
            for (; k < some; k++) out[k] = value(k);
            from += some, table += step * some * each;
        }
        return true;
    };
    const std::integral_constant<int64_t, 0> same;
    const std::integral_constant<int64_t, 1> next;
    if (height < 0) {
        for (int64_t k = 0; k < count; k += width)
            if (!write(k, k + width, 0, next)) return 1;
    } else if (height == 0) {
        for (int64_t k = 0, end; k < count; k = end) {
            const int64_t row = kept[k] / width, bound = (row + 1) * width;
            end = first_from(bound, kept, k, count);
            if (!write(k, end, row, same)) return 1;
        }
    } else {
        for (int64_t k = 0, tile = 0; k < count; tile++) {
            const int64_t number = kept ? kept[tile] : 0, first = number / wide * height;
            const int64_t inside = std::min(width, columns - number % wide * width);
            if (inside < 0 || first < 0) return 1;
            for (int64_t row = first; row < first + height; row++, k += width)
                if (!write(k, k + inside, row, same) || !write(k + inside, k + width, rows - 1, same)) return 1;
        }
    }
    return 0;
}

// Write where the sorted places of each row of a weight start, and the last ones end, and the column of each place.
// Return 1 where a place is beyond the last row, else 0.
extern "C" int split_rows(const int32_t* places, int64_t count, int64_t rows, int64_t width, int32_t* starts,
                          uint16_t* columns) {
    int64_t k = 0;
    for (int64_t row = 0; row < rows; row++) {
        starts[row] = static_cast<int32_t>(k);
        const int64_t end = first_from((row + 1) * width, places, k, count);
        for (; k < end; k++) columns[k] = static_cast<uint16_t>(places[k] - row * width);
    }
    starts[rows] = static_cast<int32_t>(count);
    return k < count;
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
// The places must be unique. Count the values that are not zero and the entries whose bits change. Sum the squared
// rounding errors and the squares of the values.
extern "C" int add_rounded(const int32_t* places, const float* values, int64_t count, int64_t size, uint16_t* weight,
                           int64_t* counts, double* squares) {
    constexpr int64_t BLOCK = 256, LANES = 8;  // sums of several lanes do not wait for each other
    int64_t moved = 0, changed = 0;
    double lost[LANES] = {}, norm[LANES] = {};
    for (int64_t first = 0; first < count; first += BLOCK) {
        const int64_t here = std::min(BLOCK, count - first);
        const int32_t* own = places + first;
        uint32_t outside = 0;
        for (int64_t k = 0; k < here; k++) outside |= static_cast<uint32_t>(own[k]) >= static_cast<uint64_t>(size);
        if (outside) return 1;
        uint16_t before[BLOCK] = {}, after[BLOCK];
        float added[BLOCK] = {}, exact[BLOCK];
        for (int64_t k = 0; k < here; k++) before[k] = weight[own[k]];
        std::memcpy(added, values + first, 4 * here);
        int32_t zeros = 0, same = 0;
        for (int64_t k = 0; k < BLOCK; k++) {
            exact[k] = widened(before[k]) + added[k];
            after[k] = narrowed(exact[k]);
            zeros += added[k] == 0;
        }
        for (int64_t k = 0; k < BLOCK; k++) same += after[k] == before[k];
        for (int64_t k = 0; k < BLOCK; k += LANES)
            for (int64_t lane = 0; lane < LANES; lane++) {
                const double error = double{widened(after[k + lane])} - exact[k + lane];
                lost[lane] += error * error, norm[lane] += double{added[k + lane]} * added[k + lane];
            }
        moved += BLOCK - zeros, changed += BLOCK - same;
        for (int64_t k = 0; k < here; k++) weight[own[k]] = after[k];
    }
    counts[0] = moved, counts[1] = changed;
    squares[0] = squares[1] = 0;
    for (int64_t lane = 0; lane < LANES; lane++) squares[0] += lost[lane], squares[1] += norm[lane];
    return 0;
}

// Write the places of the scores at or above the bound, in order, without those of the sorted list `kept`. Return their
// number, or -1 if any score is not a number. `places` has room for 16 more than there are scores.
extern "C" int64_t find_at_least(const float* scores, int64_t size, float bound, const int32_t* kept, int64_t held,
                                 int32_t* places) {
    int64_t count = 0, next = 0;
    int unordered = 0;
    for (int64_t first = 0; first < size; first += TILE) {
        const int64_t last = std::min(first + TILE, size);
        for (int64_t i = first; i < last; i++) unordered |= scores[i] != scores[i];
        int64_t found = count, i = first;
#ifdef __AVX512F__
        for (; i + 16 <= last; i += 16) {
            const __mmask16 mask = _mm512_cmp_ps_mask(_mm512_loadu_ps(scores + i), _mm512_set1_ps(bound), _CMP_GE_OQ);
            const __m512i place = _mm512_add_epi32(UP, _mm512_set1_epi32(static_cast<int32_t>(i)));
            _mm512_storeu_si512(places + found, _mm512_maskz_compress_epi32(mask, place));
            found += __builtin_popcount(mask);
        }
#endif
        for (; i < last; i++) {
            places[found] = static_cast<int32_t>(i);  // without a branch, which would be mispredicted at one of ten
            found += scores[i] >= bound;
        }
        if (held == 0) {
            count = found;
            continue;
        }
        for (int64_t k = count; k < found; k++) {
            const int32_t place = places[k];
            while (next < held && kept[next] < place) next++;
            places[count] = place;
            count += next == held || kept[next] != place;
        }
    }
    return unordered ? -1 : count;
}

// Write for each of the sorted numbers `after` its place among the sorted numbers `before`, or -1, and the places of those
// of `before` that are not among `after`, whose number is returned. `left` has room for one more than there are.
extern "C" int64_t find_sorted(const int32_t* before, int64_t held, const int32_t* after, int64_t count, int64_t* slots,
                               int64_t* left) {
    int64_t slot = 0, i = 0, gone = 0;
    while (i < count && slot < held) {  // without a branch on what is found, which would be mispredicted
        const int32_t old = before[slot], own = after[i];
        slots[i] = old == own ? slot : -1;
        left[gone] = slot;
        gone += old < own, slot += old <= own, i += own <= old;
    }
    std::fill(slots + i, slots + count, -1);
    while (slot < held) left[gone++] = slot++;
    return gone;
}

// Copy rows of `width` values to the slots that they take: to each new slot the row of its former slot, or zeros for -1.
extern "C" void carry(const float* values, int64_t width, const int64_t* slots, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i++) {
        if (width == 1) out[i] = slots[i] < 0 ? 0.0f : values[slots[i]];
        else if (slots[i] < 0) std::fill_n(out + i * width, width, 0.0f);
        else std::memcpy(out + i * width, values + slots[i] * width, 4 * width);
    }
}
