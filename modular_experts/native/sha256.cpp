// SHA-256 (FIPS 180-4) of several messages, two at a time, with the instructions that processors have for it.
//
// Each round needs the one before, so one message leaves the processor waiting for half of the time; a second one fills
// the gaps. Where the instructions are missing, `sha256` returns 1, and the caller takes another way.
#include <cstdint>
#include <cstring>

#if defined(__SHA__) && defined(__SSE4_1__)
#include <immintrin.h>

namespace {

constexpr int64_t BLOCK = 64;  // bytes that one compression takes

alignas(64) constexpr uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

// The eight words a..h of a state, in the order in which the instructions want them.
struct State {
    __m128i abef = _mm_set_epi32(0x6a09e667, int(0xbb67ae85), 0x510e527f, int(0x9b05688c));
    __m128i cdgh = _mm_set_epi32(0x3c6ef372, int(0xa54ff53a), 0x1f83d9ab, 0x5be0cd19);
};

// Compress as many blocks of each message into its state.
template <int LANES>
void compress(State* states, const uint8_t* const* messages, int64_t blocks) {
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    __m128i abef[LANES], cdgh[LANES], words[LANES][4];
    for (int lane = 0; lane < LANES; lane++) abef[lane] = states[lane].abef, cdgh[lane] = states[lane].cdgh;
    for (int64_t block = 0; block < blocks; block++) {
        __m128i old_abef[LANES], old_cdgh[LANES];
        for (int lane = 0; lane < LANES; lane++) {
            old_abef[lane] = abef[lane], old_cdgh[lane] = cdgh[lane];
            const auto* content = reinterpret_cast<const __m128i*>(messages[lane] + BLOCK * block);
            for (int part = 0; part < 4; part++)
                words[lane][part] = _mm_shuffle_epi8(_mm_loadu_si128(content + part), swap);
        }
#pragma GCC unroll 16
        for (int four = 0; four < 16; four++) {  // four rounds
            const __m128i constants = _mm_load_si128(reinterpret_cast<const __m128i*>(K) + four);
#pragma GCC unroll 4
            for (int lane = 0; lane < LANES; lane++) {
                __m128i* w = words[lane];
                __m128i& now = w[four & 3];
                const __m128i sums = _mm_add_epi32(now, constants);
                cdgh[lane] = _mm_sha256rnds2_epu32(cdgh[lane], abef[lane], sums);
                abef[lane] = _mm_sha256rnds2_epu32(abef[lane], cdgh[lane], _mm_shuffle_epi32(sums, 0x0e));
                if (four < 12) {  // the words that are needed four times later
                    const __m128i& third = w[(four + 2) & 3];
                    const __m128i& fourth = w[(four + 3) & 3];
                    now = _mm_sha256msg1_epu32(now, w[(four + 1) & 3]);
                    now = _mm_sha256msg2_epu32(_mm_add_epi32(now, _mm_alignr_epi8(fourth, third, 4)), fourth);
                }
            }
        }
        for (int lane = 0; lane < LANES; lane++) {
            abef[lane] = _mm_add_epi32(abef[lane], old_abef[lane]);
            cdgh[lane] = _mm_add_epi32(cdgh[lane], old_cdgh[lane]);
        }
    }
    for (int lane = 0; lane < LANES; lane++) states[lane].abef = abef[lane], states[lane].cdgh = cdgh[lane];
}

// Compress what is left after the whole blocks, with the padding, and write the digest.
void finish(State state, const uint8_t* message, int64_t size, uint8_t* digest) {
    uint8_t last[2 * BLOCK] = {};
    const int64_t left = size % BLOCK, blocks = left + 9 > BLOCK ? 2 : 1;
    std::memcpy(last, message + size - left, left);
    last[left] = 0x80;
    for (int place = 0; place < 8; place++) last[BLOCK * blocks - 1 - place] = uint8_t(uint64_t(8 * size) >> 8 * place);
    const uint8_t* content = last;
    compress<1>(&state, &content, blocks);
    uint32_t abef[4], cdgh[4];
    std::memcpy(abef, &state.abef, 16), std::memcpy(cdgh, &state.cdgh, 16);
    const uint32_t words[8] = {abef[3], abef[2], cdgh[3], cdgh[2], abef[1], abef[0], cdgh[1], cdgh[0]};
    for (int place = 0; place < 32; place++) digest[place] = uint8_t(words[place / 4] >> (24 - 8 * (place % 4)));
}

}  // namespace

// Write the digests of messages, 32 bytes each. Neighbours are hashed together, best if they are of like size.
extern "C" int sha256(const uint8_t* const* messages, const int64_t* sizes, int64_t count, uint8_t* digests) {
    for (int64_t first = 0; first < count; first += 2) {
        State states[2];
        const int64_t lanes = count - first < 2 ? 1 : 2;
        int64_t common = 0;
        if (lanes == 2) {
            common = (sizes[first] < sizes[first + 1] ? sizes[first] : sizes[first + 1]) / BLOCK;
            compress<2>(states, messages + first, common);
        }
        for (int64_t lane = 0; lane < lanes; lane++) {
            const int64_t message = first + lane;
            const uint8_t* rest = messages[message] + BLOCK * common;
            compress<1>(states + lane, &rest, sizes[message] / BLOCK - common);
            finish(states[lane], messages[message], sizes[message], digests + 32 * message);
        }
    }
    return 0;
}

#else

extern "C" int sha256(const uint8_t* const*, const int64_t*, int64_t, uint8_t*) { return 1; }

#endif
