// The gradient g^T x of only the kept units of a weight (out, in), for x (tokens, in) and g (tokens, out).
//
// Both kernels take CHUNK tokens at a time: they bring x and g of these into the order in which they are read, as
// float32, and add the chunk's share to the result. So beside it they need one chunk of x and g, not a copy of either.
//
// * Tiles are made of pieces of L times L. One stays in registers while the tokens pass: at each, L values of x, a
//   vector, times L single values of g. They are read from panels of L columns, which lie in x and g themselves unless
//   these are bfloat16, reach over the edge, or are read so often that a copy without gaps pays.
// * Entries are dot products of a column of x and one of g, so both are transposed. The plan sorts them by blocks of
//   BLOCK columns of x, which stay in the first-level cache while those of g stream past. As many entries as a vector
//   has lanes are done at once, and then their lanes summed together.
//
// Threads share the kept units, and the sum of each has one order: the result does not depend on their number.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

namespace {

#if defined(__AVX512F__) && defined(__AVX512VL__)
constexpr int NATIVE = 16, ACCUMULATORS = 16;  // floats in a register; registers that sum
#elif defined(__AVX__)
constexpr int NATIVE = 8, ACCUMULATORS = 8;
#else
constexpr int NATIVE = 4, ACCUMULATORS = 16;
#endif
constexpr int64_t CHUNK = 64, BLOCK = 64;  // BLOCK as in native.py
constexpr int64_t READS = 4;               // reads of a panel above which its copy pays; measured on 16-tiles

template <int N> struct Lanes {
    typedef float floats __attribute__((vector_size(N * 4), aligned(4), may_alias));
    typedef uint32_t bits __attribute__((vector_size(N * 4), aligned(4), may_alias));
    typedef uint16_t halves __attribute__((vector_size(N * 2), aligned(2), may_alias));
};
template <int N> using Vec = typename Lanes<N>::floats;
using V = Vec<NATIVE>;
using Index = std::make_integer_sequence<int, NATIVE>;

struct Matrix {
    const void* data;
    int64_t stride, rows, columns;
    bool half;  // bfloat16, else float32
};

struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Buffer = std::unique_ptr<float[], Free>;
Buffer buffer(int64_t count) {
    return Buffer(static_cast<float*>(::operator new[](count * 4 + 4, std::align_val_t{64})));
}

template <int N, class S> inline Vec<N> load(const S* p) {
    using Bits = typename Lanes<N>::bits;
    if constexpr (sizeof(S) == 4) return *reinterpret_cast<const Vec<N>*>(p);
    else return (Vec<N>)(__builtin_convertvector(*reinterpret_cast<const typename Lanes<N>::halves*>(p), Bits) << 16);
}

// The first `count` of N values, then zeros.
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

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Lanes<NATIVE>::bits{__VA_ARGS__})
#endif
// Lanes of a, but where the lane's number has the bit `step`, lanes of b; one of the two moves over by `step`.
template <int step, int... I> inline V low(V a, V b, std::integer_sequence<int, I...>) {
    return SHUFFLE(a, b, (I & step ? NATIVE + (I ^ step) : I)...);
}
template <int step, int... I> inline V high(V a, V b, std::integer_sequence<int, I...>) {
    return SHUFFLE(a, b, (I & step ? NATIVE + I : I ^ step)...);
}

template <int step = 1> inline void transpose(V* v) {
    if constexpr (step < NATIVE) {
        for (int i = 0; i < NATIVE; i++) {
            if (i & step) continue;
            const V a = v[i], b = v[i + step];
            v[i] = low<step>(a, b, Index{}), v[i + step] = high<step>(a, b, Index{});
        }
        transpose<2 * step>(v);
    }
}

// Lane i is the sum over the lanes of v[i].
template <int step = NATIVE / 2> inline V sums(const V* v) {
    if constexpr (step == 0) return *v;
    else {
        const V a = sums<step / 2>(v), b = sums<step / 2>(v + step);
        return low<step>(a, b, Index{}) + high<step>(a, b, Index{});
    }
}

// Write NATIVE columns from `column` on, CHUNK tokens of each from `first` on, as rows; zero beyond the matrix.
template <class S> void transposed(const Matrix& m, int64_t first, int64_t column, float* to) {
    for (int64_t t = 0; t < CHUNK; t += NATIVE) {
        const S* from = static_cast<const S*>(m.data) + (first + t) * m.stride + column;
        const int64_t rows = m.rows - first - t, columns = m.columns - column;
        V v[NATIVE];
        for (int i = 0; i < NATIVE; i++) v[i] = load_some<NATIVE>(from + i * m.stride, i < rows ? columns : 0);
        transpose(v);
        for (int i = 0; i < NATIVE; i++) *reinterpret_cast<V*>(to + i * CHUNK + t) = v[i];
    }
}
void transposed(const Matrix& m, int64_t first, int64_t column, float* to) {
    m.half ? transposed<uint16_t>(m, first, column, to) : transposed<float>(m, first, column, to);
}

// Write `count` columns of the tokens [first, last), widened to L with zeros.
template <int L, class S>
void copy(const Matrix& m, int64_t first, int64_t last, int64_t column, int64_t count, float* to) {
    constexpr int N = std::min(L, NATIVE);
    const S* from = static_cast<const S*>(m.data) + first * m.stride + column;
    for (int64_t t = first; t < last; t++, from += m.stride, to += L) {
        __builtin_prefetch(from + 4 * m.stride);  // the hardware does not foresee so long steps: a quarter of all time
        for (int w = 0; w < L; w += N) *reinterpret_cast<Vec<N>*>(to + w) = load_some<N>(from + w, count - w);
    }
}

struct Panel {
    const float* data;
    int64_t stride;
};

// The columns of a matrix as panels: `pieces` of L for each of `count` tiles, here or in a copy.
template <int L> struct Panels {
    const Matrix& m;
    int64_t size, pieces, count;
    bool direct;

    Panels(const Matrix& m, int64_t size, int64_t kept)
        : m(m), size(size), pieces((size + L - 1) / L), count((m.columns + size - 1) / size),
          direct(!m.half && size % L == 0 && m.columns % size == 0 && kept * pieces <= READS * count) {}
    int64_t column(int64_t panel) const { return panel / pieces * size + panel % pieces * L; }
    // How many columns of a panel lie inside of its tile and of the matrix.
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

// Add the product of two panels to a piece at `out`, of which `rows` and `columns` exist.
template <int L>
void piece(Panel x, Panel g, int64_t tokens, float* out, int64_t stride, int64_t rows, int64_t columns) {
    constexpr int N = std::min(L, NATIVE), W = L / N, R = std::min(L, ACCUMULATORS / W);
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
    const Buffer x_copy = buffer(xs.direct ? 0 : xs.count * pieces * CHUNK * L);
#pragma omp parallel num_threads(threads)
    {
        const Buffer g_copy = buffer(CHUNK * L);
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

// Add the dot products of a chunk at groups of NATIVE entries. A function of its own: inside of another the compiler
// runs out of registers, which takes a third of the speed, and a second copy may fuse other products: other bits.
__attribute__((noinline)) void dots(const float* x, const float* g, const uint32_t* places, int64_t groups,
                                    float* out) {
    for (const uint32_t* end = places + groups * NATIVE; places < end; places += NATIVE, out += NATIVE) {
        V sum[NATIVE];
#pragma GCC unroll 16
        for (int i = 0; i < NATIVE; i++) {
            const float *xs = x + places[i] % BLOCK * CHUNK, *gs = g + places[i] / BLOCK * CHUNK;
            sum[i] = V{};
#pragma GCC unroll 16
            for (int64_t t = 0; t < CHUNK; t += NATIVE) sum[i] += load<NATIVE>(xs + t) * load<NATIVE>(gs + t);
        }
        add_some<NATIVE>(out, sums(sum), NATIVE);
    }
}

void entries(const float* x, const float* g, const uint32_t* places, int64_t count, float* out) {
    const int64_t groups = count / NATIVE, rest = count % NATIVE;
    dots(x, g, places, groups, out);
    uint32_t some[NATIVE] = {};
    float sum[NATIVE] = {};
    std::copy_n(places + groups * NATIVE, rest, some);
    std::copy_n(out + groups * NATIVE, rest, sum);
    if (rest) dots(x, g, some, 1, sum);
    std::copy_n(sum, rest, out + groups * NATIVE);
}

}  // namespace

// Units are tiles; starts `(rows of tiles + 1,)` tells where those of a row begin. The result is zero before.
extern "C" void kept_tiles(const void* x, int64_t x_stride, const void* g, int64_t g_stride, int half, int64_t tokens,
                           int64_t in, int64_t out, const uint32_t* units, const int64_t* starts, int64_t size,
                           float* result, int threads) {
    const Matrix xs{x, x_stride, tokens, in, half != 0}, gs{g, g_stride, tokens, out, half != 0};
    if (size <= 8) tiles<8>(xs, gs, units, starts, size, result, threads);
    else tiles<16>(xs, gs, units, starts, size, result, threads);
}

// Places are `row * BLOCK + column % BLOCK`, sorted by block of columns, then row; starts `(blocks + 1,)` tells where
// those of a block begin, and order where in the result each belongs.
extern "C" void kept_entries(const void* x, int64_t x_stride, const void* g, int64_t g_stride, int half, int64_t tokens,
                             int64_t in, int64_t out, const uint32_t* places, const int64_t* starts,
                             const int32_t* order, float* result, int threads) {
    const Matrix xs{x, x_stride, tokens, in, half != 0}, gs{g, g_stride, tokens, out, half != 0};
    const int64_t blocks = (in + BLOCK - 1) / BLOCK, kept = starts[blocks];
    const int64_t parts = blocks >= 4 * threads ? 1 : (4 * threads + blocks - 1) / blocks;  // work for every thread
    const Buffer rows = buffer((out + NATIVE) * CHUNK), sum = buffer(kept);
    std::fill_n(sum.get(), kept, 0.0f);
#pragma omp parallel num_threads(threads)
    {
        const Buffer columns = buffer(BLOCK * CHUNK);
        for (int64_t first = 0; first < tokens; first += CHUNK) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < out; row += NATIVE) transposed(gs, first, row, &rows[row * CHUNK]);
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < blocks * parts; task++) {
                const int64_t block = task / parts, part = task % parts, held = starts[block + 1] - starts[block];
                const int64_t start = starts[block] + held * part / parts;
                const int64_t end = starts[block] + held * (part + 1) / parts;
                if (start == end) continue;
                for (int64_t c = 0; c < BLOCK; c += NATIVE)
                    transposed(xs, first, block * BLOCK + c, &columns[c * CHUNK]);
                entries(&columns[0], &rows[0], places + start, end - start, &sum[start]);
            }
        }
#pragma omp for schedule(static)
        for (int64_t e = 0; e < kept; e++) result[order[e]] = sum[e];
    }
}
