// Vectors of LANES floats and aligned room, for a file that defines LANES before it includes this one.
#include <cstdint>
#include <memory>
#include <new>
#include <utility>

namespace {

typedef float V __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
using Index = std::make_integer_sequence<int, LANES>;

struct Free {
    void operator()(void* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
template <class T> using Buffer = std::unique_ptr<T[], Free>;
template <class T> Buffer<T> buffer(int64_t count) {
    return Buffer<T>(static_cast<T*>(::operator new[](count * sizeof(T) + 64, std::align_val_t{64})));
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Bits{__VA_ARGS__})
#endif
// Two halves of a transposition: take lanes from a, and from b where the number of the lane has the bit `step`. In
// `low` the lanes of b move by `step`, in `high` the lanes of a.
template <int step, int... I> inline V low(V a, V b, std::integer_sequence<int, I...>) {
    return SHUFFLE(a, b, (I & step ? LANES + (I ^ step) : I)...);
}
template <int step, int... I> inline V high(V a, V b, std::integer_sequence<int, I...>) {
    return SHUFFLE(a, b, (I & step ? LANES + I : I ^ step)...);
}

template <int step = 1> inline void transpose(V* v) {
    if constexpr (step < LANES) {
        for (int i = 0; i < LANES; i++) {
            if (i & step) continue;
            const V a = v[i], b = v[i + step];
            v[i] = low<step>(a, b, Index{}), v[i + step] = high<step>(a, b, Index{});
        }
        transpose<2 * step>(v);
    }
}

// Return the vector whose lane i is the sum of all lanes of v[i].
template <int step = LANES / 2> inline V sums_of(const V* v) {
    if constexpr (step == 0) return *v;
    else {
        const V a = sums_of<step / 2>(v), b = sums_of<step / 2>(v + step);
        return low<step>(a, b, Index{}) + high<step>(a, b, Index{});
    }
}

}  // namespace
