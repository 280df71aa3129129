// The gradient g^T x of only the kept units of a weight (out, in), for x (tokens, in) and g (tokens, out).
//
// Both kernels work on CHUNK tokens at a time. They copy that part of x and g into the order in which they read it, as
// float32, and add its products to the result, so that they never hold a copy of all of x or g.
//
// * Tiles are computed in pieces of L times L. The sums of a piece stay in registers while the loop runs over the
//   tokens; each token adds L values of x, as a vector, times L single values of g. A piece reads panels of L columns.
//   A panel lies in x or g itself, unless the matrix is bfloat16, the panel reaches over the edge, or the panel is read
//   so often that a copy without gaps is faster.
// * Entries are dot products of a column of x and a column of g, so both matrices are transposed. The plan sorts the
//   entries by blocks of BLOCK columns of x. A block stays in the first-level cache while the columns of g stream past.
//   The kernel computes as many entries at once as a vector has lanes, and then sums the lanes of all of them together.
//
// Threads share the kept units. The sum of a unit has one order, so the number of threads does not change the result.
#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512VL__)
constexpr int LANES = 16, ACCUMULATORS = 16;  // floats in a register, and registers that hold sums
#elif defined(__AVX__)
constexpr int LANES = 8, ACCUMULATORS = 8;
#else
constexpr int LANES = 4, ACCUMULATORS = 16;
#endif
#include "../native/lanes.h"

namespace {

constexpr int64_t CHUNK = 64, BLOCK = 64;  // BLOCK must agree with native.py
constexpr int64_t READS = 4;               // reads of a panel above which its copy pays; measured on 16-tiles

template <int N> struct Lanes {
    typedef float floats __attribute__((vector_size(N * 4), aligned(4), may_alias));
    typedef uint32_t bits __attribute__((vector_size(N * 4), aligned(4), may_alias));
    typedef uint16_t halves __attribute__((vector_size(N * 2), aligned(2), may_alias));
};
template <int N> using Vec = typename Lanes<N>::floats;

struct Matrix {
    const void* data;
    int64_t stride, rows, columns;
    bool half;  // bfloat16, else float32
};

template <int N, class S> inline Vec<N> load(const S* p) {
    using Bits = typename Lanes<N>::bits;
    if constexpr (sizeof(S) == 4) return *reinterpret_cast<const Vec<N>*>(p);
    else return (Vec<N>)(__builtin_convertvector(*reinterpret_cast<const typename Lanes<N>::halves*>(p), Bits) << 16);
}

// Load the first `count` of N values, and zeros for the others.
template <int N, class S> inline Vec<N> load_some(const S* p, int64_t count) {
    if (count >= N) return load<N>(p);
    S some[N] = {};
    if (count > 0) std::memcpy(some, p, count * sizeof(S));
    return load<N>(some);
}

template <int N> inline void add_some(float* p, Vec<N> v, int64_t count) {
    v += load_some<N>(p, count);
    if (count >= N) *reinterpret_cast<Vec<N>*>(p) = v;
    else if (count > 0) std::memcpy(p, &v, count * 4);
}

// Write LANES columns as rows, starting at `column`, with CHUNK tokens of each, starting at `first`. Beyond the matrix
// the values are zero.
template <class S> void transposed(const Matrix& m, int64_t first, int64_t column, float* to) {
    for (int64_t t = 0; t < CHUNK; t += LANES) {
        const S* from = static_cast<const S*>(m.data) + (first + t) * m.stride + column;
        const int64_t rows = m.rows - first - t, columns = m.columns - column;
        V v[LANES];
        for (int i = 0; i < LANES; i++) v[i] = load_some<LANES>(from + i * m.stride, i < rows ? columns : 0);
        transpose(v);
        for (int i = 0; i < LANES; i++) *reinterpret_cast<V*>(to + i * CHUNK + t) = v[i];
    }
}
void transposed(const Matrix& m, int64_t first, int64_t column, float* to) {
    m.half ? transposed<uint16_t>(m, first, column, to) : transposed<float>(m, first, column, to);
}

// Write `count` columns of the tokens [first, last), followed by zeros up to L columns.
template <int L, class S>
void copy(const Matrix& m, int64_t first, int64_t last, int64_t column, int64_t count, float* to) {
    constexpr int N = std::min(L, LANES);
    const S* from = static_cast<const S*>(m.data) + first * m.stride + column;
    for (int64_t t = first; t < last; t++, from += m.stride, to += L) {
        __builtin_prefetch(from + 4 * m.stride);  // the hardware misses such long steps: 25 % of the time
        for (int w = 0; w < L; w += N) *reinterpret_cast<Vec<N>*>(to + w) = load_some<N>(from + w, count - w);
    }
}

struct Panel {
    const float* data;
    int64_t stride;
};

// Divide the columns of a matrix into panels: each of `count` tiles has `pieces` panels of L columns. With `direct`
// they are read in place, else from a copy.
template <int L> struct Panels {
    const Matrix& m;
    int64_t size, pieces, count;
    bool direct;

    Panels(const Matrix& m, int64_t size, int64_t kept)
        : m(m), size(size), pieces((size + L - 1) / L), count((m.columns + size - 1) / size),
          direct(!m.half && size % L == 0 && m.columns % size == 0 && kept * pieces <= READS * count) {}
    int64_t column(int64_t panel) const { return panel / pieces * size + panel % pieces * L; }
    // Return how many columns of a panel lie inside both its tile and the matrix.
    int64_t inside(int64_t panel) const {
        return std::min({int64_t{L}, size - panel % pieces * L, m.columns - column(panel)});
    }
    Panel in_place(int64_t panel, int64_t first) const {
        return {static_cast<const float*>(m.data) + first * m.stride + column(panel), m.stride};
    }
    Panel copied(int64_t panel, int64_t first, int64_t last, float* to) const {
        if (m.half) copy<L, uint16_t>(m, first, last, column(panel), inside(panel), to);
        else copy<L, float>(m, first, last, column(panel), inside(panel), to);
        return {to, L};
    }
};

// Add the product of two panels to the piece at `out`, which has `rows` rows and `columns` columns inside the weight.
template <int L>
void piece(Panel x, Panel g, int64_t tokens, float* out, int64_t stride, int64_t rows, int64_t columns) {
    constexpr int N = std::min(L, LANES), W = L / N, R = std::min(L, ACCUMULATORS / W);
    for (int r = 0; r < rows; r += R) {
        Vec<N> sum[R][W] = {};
        for (int64_t t = 0; t < tokens; t++) {
            const float *xs = x.data + t * x.stride, *gs = g.data + t * g.stride + r;
            __builtin_prefetch(xs + 12 * x.stride), __builtin_prefetch(gs + 12 * g.stride);
#pragma GCC unroll 16
            for (int i = 0; i < R; i++)
#pragma GCC unroll 4
                for (int w = 0; w < W; w++) sum[i][w] += load<N>(xs + w * N) * gs[i];
        }
        for (int i = 0; i < R && r + i < rows; i++)
            for (int w = 0; w < W; w++) add_some<N>(out + (r + i) * stride + w * N, sum[i][w], columns - w * N);
    }
}

template <int L>
void tiles(const Matrix& x, const Matrix& g, const uint32_t* units, const int64_t* starts, int64_t size, float* out,
           int threads) {
    const int64_t tall = (g.columns + size - 1) / size, kept = starts[tall];
    const Panels<L> xs(x, size, kept), gs(g, size, kept);
    const int64_t pieces = xs.pieces;
    const auto x_copy = buffer<float>(xs.direct ? 0 : xs.count * pieces * CHUNK * L);
#pragma omp parallel num_threads(threads)
    {
        const auto g_copy = buffer<float>(CHUNK * L);
        for (int64_t first = 0; first < x.rows; first += CHUNK) {
            const int64_t last = std::min(first + CHUNK, x.rows);
#pragma omp for schedule(static)
            for (int64_t p = 0; p < (xs.direct ? 0 : xs.count * pieces); p++)
                xs.copied(p, first, last, &x_copy[p * CHUNK * L]);
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < tall * pieces; i++) {
                const int64_t row = i / pieces, rows = gs.inside(i);
                if (starts[row] == starts[row + 1] || rows <= 0) continue;
                const Panel panel = gs.direct ? gs.in_place(i, first) : gs.copied(i, first, last, g_copy.get());
                for (int64_t k = starts[row]; k < starts[row + 1]; k++)
                    for (int64_t j = 0; j < pieces; j++) {
                        const int64_t p = (units[k] - static_cast<uint32_t>(row * xs.count)) * pieces + j;
                        const Panel inputs = xs.direct ? xs.in_place(p, first) : Panel{&x_copy[p * CHUNK * L], L};
                        float* to = out + (k * size + i % pieces * L) * size + j * L;
                        piece<L>(inputs, panel, last - first, to, size, rows, xs.inside(p));
                    }
            }
        }
    }
}

// Add the dot products of a chunk for groups of LANES entries. It must not be inlined: inside another function the
// compiler runs out of registers, which costs a third of the speed. A second copy might also fuse other products and
// additions, which would change the last bits.
__attribute__((noinline)) void dots(const float* x, const float* g, const uint32_t* places, int64_t groups,
                                    float* out) {
    for (const uint32_t* end = places + groups * LANES; places < end; places += LANES, out += LANES) {
        V sum[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            const float *xs = x + places[i] % BLOCK * CHUNK, *gs = g + places[i] / BLOCK * CHUNK;
            sum[i] = V{};
#pragma GCC unroll 16
            for (int64_t t = 0; t < CHUNK; t += LANES) sum[i] += load<LANES>(xs + t) * load<LANES>(gs + t);
        }
        add_some<LANES>(out, sums_of(sum), LANES);
    }
}

void entries(const float* x, const float* g, const uint32_t* places, int64_t count, float* out) {
    const int64_t groups = count / LANES, rest = count % LANES;
    dots(x, g, places, groups, out);
    uint32_t some[LANES] = {};
    float sum[LANES] = {};
    std::copy_n(places + groups * LANES, rest, some);
    std::copy_n(out + groups * LANES, rest, sum);
    if (rest) dots(x, g, some, 1, sum);
    std::copy_n(sum, rest, out + groups * LANES);
}

}  // namespace

// Compute the kept tiles. The tiles of row r of the grid are units[starts[r]] to units[starts[r + 1] - 1]. The caller
// fills the result with zeros, because each chunk of tokens adds to it.
extern "C" void kept_tiles(const void* x, int64_t x_stride, const void* g, int64_t g_stride, int half, int64_t tokens,
                           int64_t in, int64_t out, const uint32_t* units, const int64_t* starts, int64_t size,
                           float* result, int threads) {
    const Matrix xs{x, x_stride, tokens, in, half != 0}, gs{g, g_stride, tokens, out, half != 0};
    if (size <= 8) tiles<8>(xs, gs, units, starts, size, result, threads);
    else tiles<16>(xs, gs, units, starts, size, result, threads);
}

// Plan `kept_entries`: sort the places of `count` entries, which ascend, by block of columns, and keep their order within
// it. `starts` has room for one number more than there are blocks.
extern "C" void plan_entries(const int64_t* units, int64_t count, int64_t in, uint32_t* places, int64_t* starts,
                             int32_t* order) {
    const int64_t blocks = (in + BLOCK - 1) / BLOCK;
    const std::unique_ptr<int64_t[]> next(new int64_t[blocks + 1]());
    for (int64_t e = 0, row = 0; e < count; e++) {
        while (units[e] >= (row + 1) * in) row++;
        next[(units[e] - row * in) / BLOCK + 1]++;
    }
    for (int64_t b = 0; b < blocks; b++) next[b + 1] += next[b];
    std::copy_n(next.get(), blocks + 1, starts);
    for (int64_t e = 0, row = 0; e < count; e++) {
        while (units[e] >= (row + 1) * in) row++;
        const int64_t column = units[e] - row * in, place = next[column / BLOCK]++;
        places[place] = static_cast<uint32_t>(row * BLOCK + column % BLOCK);
        order[place] = static_cast<int32_t>(e);
    }
}

// Compute the kept entries. A place is `row * BLOCK + column % BLOCK`; places are sorted by block of columns, then row.
// Block b has the places starts[b] to starts[b + 1] - 1, and order[e] is the slot of place e in the result.
extern "C" void kept_entries(const void* x, int64_t x_stride, const void* g, int64_t g_stride, int half, int64_t tokens,
                             int64_t in, int64_t out, const uint32_t* places, const int64_t* starts,
                             const int32_t* order, float* result, int threads) {
    const Matrix xs{x, x_stride, tokens, in, half != 0}, gs{g, g_stride, tokens, out, half != 0};
    const int64_t blocks = (in + BLOCK - 1) / BLOCK, kept = starts[blocks];
    const int64_t parts = blocks >= 4 * threads ? 1 : (4 * threads + blocks - 1) / blocks;  // for every thread
    const auto rows = buffer<float>((out + LANES) * CHUNK), sum = buffer<float>(kept);
    std::fill_n(sum.get(), kept, 0.0f);
#pragma omp parallel num_threads(threads)
    {
        const auto columns = buffer<float>(BLOCK * CHUNK);
        for (int64_t first = 0; first < tokens; first += CHUNK) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < out; row += LANES) transposed(gs, first, row, &rows[row * CHUNK]);
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < blocks * parts; task++) {
                const int64_t block = task / parts, part = task % parts, held = starts[block + 1] - starts[block];
                const int64_t start = starts[block] + held * part / parts;
                const int64_t end = starts[block] + held * (part + 1) / parts;
                if (start == end) continue;
                for (int64_t c = 0; c < BLOCK; c += LANES)
                    transposed(xs, first, block * BLOCK + c, &columns[c * CHUNK]);
                entries(&columns[0], &rows[0], places + start, end - start, &sum[start]);
            }
        }
#pragma omp for schedule(static)
        for (int64_t e = 0; e < kept; e++) result[order[e]] = sum[e];
    }
}
