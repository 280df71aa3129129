// Add to rows of an output the products of the same rows of an input with deltas, each row with its expert's delta.
//
// For y = x D^T with x (tokens, in) and a delta D (out, in), the tokens of one expert are a part. There are two ways:
//
// * Few tokens, as in decoding: for each of them the delta's values stream past once, in their order in memory. Reading
//   them is most of the work.
// * More tokens: LANES of them, or twice as many, are copied as a panel (in, tokens), so that each value is multiplied
//   with a vector of tokens. A panel and the sums (out, tokens) stay in the fast caches.
//
// Values, input and output are all float32 or all bfloat16, and sums are float32. Threads share the rows of the weight
// in the first way and the panels in the second, so their number does not change the result.
#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__BMI2__)
#include <immintrin.h>
#define MASKED
#endif

constexpr int LANES = 16;
#include "lanes.h"

namespace {

constexpr int64_t FEW = 3;          // tokens up to which the first way is taken; a guess, not measured
// Products that one thread multiplies alone: two take 4 of 25 us less for 16,000 products on idle cores, and wait
// milliseconds for each other on busy ones.
constexpr int64_t SMALL = 1 << 16;

typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

// The inputs of one expert, and where its delta lies in memory. `products.py` writes these fields.
enum Form : int64_t { SHORT_ENTRIES, LONG_ENTRIES, TILES, LOW_RANK };
struct Part {
    int64_t form;
    const void *where, *columns, *values;  // entries: row pointers, columns, values; tiles: their numbers, null,
                                           // values; low rank: down, null, the transpose of up
    int64_t kept, height, width;           // number of tiles, or the rank; sides of a tile
    int64_t count;                         // number of inputs
    const int64_t* places;                 // their numbers, or null for all
    const float* weights;                  // one per input, or null for 1
    int64_t size(int64_t inputs, int64_t outputs) const {  // number of values
        if (form == LOW_RANK) return kept * (inputs + outputs);
        return form == TILES ? kept * height * width : static_cast<const int32_t*>(where)[outputs];
    }
};

struct Work {
    int64_t inputs, outputs, each;  // sides of the weight, and tokens of an input
    int64_t tokens(const Part& part) const { return part.count * each; }
    int64_t row(const Part& part, int64_t t) const {
        return part.places ? part.places[t / each] * each + t % each : t;
    }
    float weight(const Part& part, int64_t t) const { return part.weights ? part.weights[t / each] : 1.0f; }
};

inline float wide(float value) { return value; }
inline float wide(uint16_t half) {
    const uint32_t bits = uint32_t{half} << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline const float* widened(const float* from, int64_t, float*) { return from; }
inline const float* widened(const uint16_t* from, int64_t count, float* room) {
    for (int64_t k = 0; k < count; k++) room[k] = wide(from[k]);
    return room;
}

inline V load(const float* p) { return *reinterpret_cast<const V*>(p); }
#ifdef MASKED
inline V widened(__m256i halves) { return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16); }
inline __mmask16 first(int64_t count) { return _bzhi_u32(0xffff, std::clamp<int64_t>(count, 0, LANES)); }
inline V load(const uint16_t* p) { return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
// Load the first `count` of LANES values, and zeros for the others.
inline V load(const uint16_t* p, int64_t count) { return widened(_mm256_maskz_loadu_epi16(first(count), p)); }
inline V load(const float* p, int64_t count) { return (V)_mm512_maskz_loadu_ps(first(count), p); }
// Load x at the first `count` of LANES places, and zeros for the others.
inline V gathered(const float* x, __m512i places, __mmask16 inside) {
    return (V)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), inside, places, x, 4);
}
inline V gathered(const float* x, const uint16_t* places, int64_t count) {
    return gathered(x, _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), places)), first(count));
}
inline V gathered(const float* x, const int32_t* places, int64_t count) {
    return gathered(x, _mm512_maskz_loadu_epi32(first(count), places), first(count));
}
#else
template <class I> inline V gathered(const float* x, const I* places, int64_t count) {
    V some = {};
    for (int k = 0; k < LANES && k < count; k++) some[k] = x[places[k]];
    return some;
}
inline V load(const uint16_t* p) {
    return (V)(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Bits) << 16);
}
template <class S> inline V load(const S* p, int64_t count) {
    if (count >= LANES) return load(p);
    S some[LANES] = {};
    if (count > 0) std::memcpy(some, p, count * sizeof(S));
    return load(some);
}
#endif
inline void store(V v, float* to) { *reinterpret_cast<V*>(to) = v; }
inline void store(V v, uint16_t* to) {  // rounded to the nearest, ties to even
    const Bits bits = (Bits)v, halves = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    *reinterpret_cast<Halves*>(to) = __builtin_convertvector(v == v ? halves : halves * 0 + 0x7fc0, Halves);
}
template <class S> inline void add(V v, int64_t count, S* to) {
    if (count >= LANES) return store(load(to) + v, to);
    S some[LANES] = {};
    std::memcpy(some, to, count * sizeof(S));
    store(load(some) + v, some);
    std::memcpy(to, some, count * sizeof(S));
}

// ---- Few tokens: each function gives the product of one token with the rows [low, high) of a delta, padded to LANES.

template <class S, class I>
void multiply_entries(const Part& part, const float* x, int64_t low, int64_t high, V* out) {
    const auto* starts = static_cast<const int32_t*>(part.where);
    const auto* columns = static_cast<const I*>(part.columns);
    const auto* values = static_cast<const S*>(part.values);
    for (int64_t row = low; row < high; row += LANES) {
        const int rows = std::min<int64_t>(LANES, high - row);
        V sums[LANES] = {};
        for (int i = 0; i < rows; i++) {
            V sum = {};
            const int32_t end = starts[row + i + 1];
            for (int32_t k = starts[row + i]; k < end; k += LANES)
                sum += gathered(x, columns + k, end - k) * load(values + k, end - k);
            sums[i] = sum;
        }
        out[(row - low) / LANES] = sums_of(sums);
    }
}

// The kept tiles in one row of the grid of tiles.
struct Run {
    const Part& part;
    const int32_t* tiles;
    int64_t grid, across, from, to;
    Run(const Part& part, int64_t inputs, int64_t row)
        : part(part), tiles(static_cast<const int32_t*>(part.where)), grid((inputs + part.width - 1) / part.width) {
        across = row / part.height;
        from = std::lower_bound(tiles, tiles + part.kept, across * grid) - tiles;
        find_end();
    }
    void move_to(int64_t row) {
        for (; across < row / part.height; find_end()) across++, from = to;
    }
    void find_end() {
        for (to = from; to < part.kept && tiles[to] < (across + 1) * grid; to++) {}
    }
    int64_t column(int64_t k) const { return (tiles[k] - across * grid) * part.width; }
};

template <class S>
void multiply_tiles(const Part& part, const Work& work, const float* x, int64_t low, int64_t high, V* out) {
    const auto* values = static_cast<const S*>(part.values);
    const int64_t inputs = work.inputs, height = part.height, width = part.width;
    Run run(part, inputs, low);
    for (int64_t row = low; row < high; row += LANES) {
        V sums[LANES] = {};
        for (int64_t first = row, end = std::min(row + LANES, high); first < end;) {
            run.move_to(first);
            const int64_t top = run.across * height, last = std::min(end, top + height);
            for (int64_t k = run.from; k < run.to; k++) {
                const int64_t column = run.column(k), inside = std::min(width, inputs - column);
                for (int64_t j = 0; j < inside; j += LANES) {
                    const V here = load(x + column + j, inside - j);
                    const S* own = values + (k * height + first - top) * width + j;
                    if (inside - j >= LANES && last - first == LANES)
#pragma GCC unroll 16
                        for (int r = 0; r < LANES; r++) sums[r] += load(own + r * width) * here;
                    else
                        for (int64_t r = first; r < last; r++, own += width)
                            sums[r - row] += load(own, inside - j) * here;
                }
            }
            first = last;
        }
        out[(row - low) / LANES] = sums_of(sums);
    }
}

// Whole columns: there is one row of tiles, and their values are columns of the delta.
template <class S> void multiply_columns(const Part& part, const float* x, int64_t low, int64_t high, V* out) {
    const auto* columns = static_cast<const int32_t*>(part.where);
    for (int64_t row = low; row < high; row += LANES) {
        const S* own = static_cast<const S*>(part.values) + row;
        V sum = {};
        for (int64_t k = 0; k < part.kept; k++) sum += load(own + k * part.height, high - row) * x[columns[k]];
        out[(row - low) / LANES] = sum;
    }
}

template <class S>
void multiply_low_rank(const Part& part, const Work& work, const float* x, int64_t low, int64_t high, V* out) {
    const int64_t inputs = work.inputs, outputs = work.outputs;
    const auto* down = static_cast<const S*>(part.where);
    const auto* up = static_cast<const S*>(part.values);
    for (int64_t row = low; row < high; row += LANES) out[(row - low) / LANES] = V{};
    for (int64_t first = 0; first < part.kept; first += LANES) {
        const int ranks = std::min<int64_t>(LANES, part.kept - first);
        V products[LANES] = {};
        for (int r = 0; r < ranks; r++, down += inputs) {
            V sum[4] = {};
            int64_t column = 0;
            for (; column + 4 * LANES <= inputs; column += 4 * LANES)
                for (int i = 0; i < 4; i++) sum[i] += load(down + column + i * LANES) * load(x + column + i * LANES);
            for (; column < inputs; column += LANES)
                sum[0] += load(down + column, inputs - column) * load(x + column, inputs - column);
            products[r] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        }
        const V inner = sums_of(products);
        for (int r = 0; r < ranks; r++, up += outputs)
            for (int64_t row = low; row < high; row += LANES) {
                V& sum = out[(row - low) / LANES];
                sum += (high - row >= LANES ? load(up + row) : load(up + row, high - row)) * inner[r];
            }
    }
}

// A thread gets the same rows of the weight for each part, so it need not wait for the others between two parts.
template <class S> void few_tokens(const Part& part, const Work& work, const S* x, S* out, int threads) {
    const int64_t groups = (work.outputs + LANES - 1) / LANES;
#pragma omp for schedule(static) nowait
    for (int share = 0; share < threads; share++) {
        const int64_t low = groups * share / threads * LANES;
        const int64_t high = std::min(groups * (share + 1) / threads * LANES, work.outputs);
        const auto room = buffer<float>(work.inputs);
        const auto sums = buffer<V>((high - low + LANES - 1) / LANES);
        for (int64_t t = 0; t < work.tokens(part) && low < high; t++) {
            const float* own = widened(x + work.row(part, t) * work.inputs, work.inputs, room.get());
            V* const to = sums.get();
            if (part.form == SHORT_ENTRIES) multiply_entries<S, uint16_t>(part, own, low, high, to);
            else if (part.form == LONG_ENTRIES) multiply_entries<S, int32_t>(part, own, low, high, to);
            else if (part.form == LOW_RANK) multiply_low_rank<S>(part, work, own, low, high, to);
            else if (part.width == 1 && part.height == work.outputs) multiply_columns<S>(part, own, low, high, to);
            else multiply_tiles<S>(part, work, own, low, high, to);
            S* target = out + work.row(part, t) * work.outputs;
            const float weight = work.weight(part, t);
            for (int64_t row = low; row < high; row += LANES)
                add(to[(row - low) / LANES] * weight, high - row, target + row);
        }
    }
}

// ---- More tokens: panels and sums hold W vectors of tokens for each column and row of the weight.

template <int W, class S> void fill_panel(const S* const* rows, int tokens, int64_t inputs, V* panel) {
    for (int w = 0; w < W; w++)
        for (int64_t column = 0; column < inputs; column += LANES) {
            V v[LANES] = {};
            const int64_t count = std::min<int64_t>(LANES, inputs - column);
            for (int i = 0; i < LANES && w * LANES + i < tokens; i++) v[i] = load(rows[w * LANES + i] + column, count);
            transpose(v);
            for (int i = 0; i < count; i++) panel[(column + i) * W + w] = v[i];
        }
}

// For bfloat16 a panel of entries holds two tokens, LANES apart, in each lane: half the bytes to read.
void pair_up(V* panel, int64_t inputs) {
    for (int64_t column = 0; column < inputs; column++) {
        const Bits early = (Bits)panel[2 * column], late = (Bits)panel[2 * column + 1];
        panel[column] = (V)(early >> 16 | late);
    }
}
template <class I> void entries_by_pairs(const Part& part, int64_t outputs, const V* pairs, V* sums) {
    const auto* starts = static_cast<const int32_t*>(part.where);
    const auto* columns = static_cast<const I*>(part.columns);
    const auto* values = static_cast<const uint16_t*>(part.values);
    const auto room = buffer<float>(starts[outputs]);
    const float* own = widened(values, starts[outputs], room.get());
    for (int64_t row = 0; row < outputs; row++, sums += 2) {
        V sum[4] = {};
        int32_t k = starts[row];
        const int32_t end = starts[row + 1];
        for (; k + 2 <= end; k += 2)
            for (int i = 0; i < 2; i++) {
                const Bits both = (Bits)pairs[columns[k + i]];
                sum[2 * i] += own[k + i] * (V)(both << 16);
                sum[2 * i + 1] += own[k + i] * (V)(both & 0xffff0000);
            }
        if (k < end) {
            const Bits both = (Bits)pairs[columns[k]];
            sum[0] += own[k] * (V)(both << 16), sum[1] += own[k] * (V)(both & 0xffff0000);
        }
        sums[0] = sum[0] + sum[2], sums[1] = sum[1] + sum[3];
    }
}

template <int W, class S, class I> void entries_by_panel(const Part& part, const Work& work, const V* panel, V* sums) {
    if constexpr (W == 2 && sizeof(S) == 2) return entries_by_pairs<I>(part, work.outputs, panel, sums);
    const auto* starts = static_cast<const int32_t*>(part.where);
    const auto* columns = static_cast<const I*>(part.columns);
    const auto* values = static_cast<const S*>(part.values);
    for (int64_t row = 0; row < work.outputs; row++, sums += W) {
        V even[W] = {}, odd[W] = {};
        int32_t k = starts[row];
        const int32_t end = starts[row + 1];
        for (; k + 2 <= end; k += 2)
            for (int w = 0; w < W; w++) {
                even[w] += wide(values[k]) * panel[int64_t{columns[k]} * W + w];
                odd[w] += wide(values[k + 1]) * panel[int64_t{columns[k + 1]} * W + w];
            }
        for (int w = 0; w < W; w++)
            sums[w] = even[w] + odd[w] + (k < end ? wide(values[k]) * panel[int64_t{columns[k]} * W + w] : V{});
    }
}

// Add to sums (rows, tokens) the product of a dense matrix (rows, width) with a panel (width, tokens). Rows and columns
// of the matrix lie `down` and `across` values apart.
template <int W, int R = 8>
void dense_by_panel(const float* matrix, int64_t down, int64_t across, int64_t rows, int64_t width, const V* panel,
                    V* sums) {
    for (; rows >= R; rows -= R, matrix += R * down, sums += R * W) {
        V sum[R][W];
        for (int i = 0; i < R; i++)
            for (int w = 0; w < W; w++) sum[i][w] = sums[i * W + w];
        for (int64_t j = 0; j < width; j++)
#pragma GCC unroll 8
            for (int i = 0; i < R; i++)
                for (int w = 0; w < W; w++) sum[i][w] += matrix[i * down + j * across] * panel[j * W + w];
        for (int i = 0; i < R; i++)
            for (int w = 0; w < W; w++) sums[i * W + w] = sum[i][w];
    }
    if constexpr (R > 1)
        if (rows) dense_by_panel<W, R / 2>(matrix, down, across, rows, width, panel, sums);
}

template <int W, class S> void tiles_by_panel(const Part& part, const Work& work, const V* panel, V* sums) {
    const auto* values = static_cast<const S*>(part.values);
    const int64_t height = part.height, width = part.width;
    std::fill(sums, sums + work.outputs * W, V{});
    const auto room = buffer<float>(height * width);
    Run run(part, work.inputs, 0);
    for (int64_t top = 0; top < work.outputs; top += height) {
        run.move_to(top);
        for (int64_t k = run.from; k < run.to; k++) {
            const float* own = widened(values + k * height * width, height * width, room.get());
            const int64_t rows = std::min(height, work.outputs - top), column = run.column(k);
            const int64_t inside = std::min(width, work.inputs - column);
            dense_by_panel<W>(own, width, 1, rows, inside, panel + column * W, sums + top * W);
        }
    }
}

template <int W, class S> void low_rank_by_panel(const Part& part, const Work& work, const V* panel, V* sums) {
    const int64_t rank = part.kept;
    const auto inner = buffer<V>(rank * W);
    const auto room = buffer<float>(rank * std::max(work.inputs, work.outputs));
    std::fill(inner.get(), inner.get() + rank * W, V{});
    std::fill(sums, sums + work.outputs * W, V{});
    const float* down = widened(static_cast<const S*>(part.where), rank * work.inputs, room.get());
    dense_by_panel<W>(down, work.inputs, 1, rank, work.inputs, panel, inner.get());
    const float* up = widened(static_cast<const S*>(part.values), rank * work.outputs, room.get());
    dense_by_panel<W>(up, 1, work.outputs, work.outputs, rank, inner.get(), sums);
}

template <int W, class S>
void add_sums(const V* sums, const float* weights, int tokens, int64_t outputs, S* const* to) {
    for (int w = 0; w < W; w++)
        for (int64_t row = 0; row < outputs; row += LANES) {
            V v[LANES] = {};
            const int64_t count = std::min<int64_t>(LANES, outputs - row);
            for (int i = 0; i < count; i++) v[i] = sums[(row + i) * W + w];
            transpose(v);
            for (int i = 0; i < LANES && w * LANES + i < tokens; i++)
                add(v[i] * weights[w * LANES + i], count, to[w * LANES + i] + row);
        }
}

template <int W, class S> void more_tokens(const Part& part, const Work& work, const S* x, S* out) {
#pragma omp for schedule(static)
    for (int64_t first = 0; first < work.tokens(part); first += W * LANES) {
        const int tokens = std::min<int64_t>(W * LANES, work.tokens(part) - first);
        const S* from[W * LANES];
        S* to[W * LANES];
        float weights[W * LANES];
        for (int t = 0; t < tokens; t++) {
            const int64_t row = work.row(part, first + t);
            from[t] = x + row * work.inputs, to[t] = out + row * work.outputs;
            weights[t] = work.weight(part, first + t);
        }
        const auto panel = buffer<V>(work.inputs * W), sums = buffer<V>(work.outputs * W);
        fill_panel<W>(from, tokens, work.inputs, panel.get());
        if constexpr (W == 2 && sizeof(S) == 2)
            if (part.form < TILES) pair_up(panel.get(), work.inputs);
        if (part.form == SHORT_ENTRIES) entries_by_panel<W, S, uint16_t>(part, work, panel.get(), sums.get());
        else if (part.form == LONG_ENTRIES) entries_by_panel<W, S, int32_t>(part, work, panel.get(), sums.get());
        else if (part.form == TILES) tiles_by_panel<W, S>(part, work, panel.get(), sums.get());
        else low_rank_by_panel<W, S>(part, work, panel.get(), sums.get());
        add_sums<W>(sums.get(), weights, tokens, work.outputs, to);
    }
}

template <class S> void all_parts(const S* x, S* out, const Work& work, const Part* parts, int64_t count, int threads) {
    int64_t size = 0;
    for (int64_t number = 0; number < count; number++)
        size += parts[number].size(work.inputs, work.outputs) * work.tokens(parts[number]);
    if (size <= SMALL) threads = 1;
    // One part after the other, because an input may be in several.
#pragma omp parallel num_threads(threads)
    for (int64_t number = 0; number < count; number++) {
        const int64_t tokens = work.tokens(parts[number]);
        if (tokens <= FEW) {
            few_tokens(parts[number], work, x, out, threads);
            continue;
        }
        if (number && work.tokens(parts[number - 1]) <= FEW) {
#pragma omp barrier
        }
        if (tokens <= LANES) more_tokens<1>(parts[number], work, x, out);
        else more_tokens<2>(parts[number], work, x, out);
    }
}

}  // namespace

extern "C" void add_products(const void* x, void* out, int half, int64_t inputs, int64_t outputs, int64_t each,
                             const void* parts, int64_t count, int threads) {
    const Work work{inputs, outputs, each};
    const auto* first = static_cast<const Part*>(parts);
    if (half) all_parts(static_cast<const uint16_t*>(x), static_cast<uint16_t*>(out), work, first, count, threads);
    else all_parts(static_cast<const float*>(x), static_cast<float*>(out), work, first, count, threads);
}
