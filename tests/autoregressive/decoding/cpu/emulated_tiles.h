// AMX tiles in plain C++, so that their use is tested on processors without them: included before decoder.cpp with
// -D__AMX_BF16__ -include. A tile is 16 x 16 units of 4 bytes.
#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace emulated {

inline thread_local uint32_t tiles[8][16][16];

inline float half(uint32_t unit, int which) {
    const uint32_t bits = which ? unit & 0xffff0000 : unit << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

inline void load(int tile, const void* from, long stride) {
    for (int r = 0; r < 16; r++) memcpy(tiles[tile][r], (const char*)from + r * stride, 64);
}

inline void store(int tile, void* to, long stride) {
    for (int r = 0; r < 16; r++) memcpy((char*)to + r * stride, tiles[tile][r], 64);
}

inline void multiply(int sums, int a, int b) {
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            float sum;
            memcpy(&sum, &tiles[sums][m][n], 4);
            for (int k = 0; k < 16; k++)
                for (int i = 0; i < 2; i++) sum += half(tiles[a][m][k], i) * half(tiles[b][k][n], i);
            memcpy(&tiles[sums][m][n], &sum, 4);
        }
}

}  // namespace emulated

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_zero(tile) memset(emulated::tiles[tile], 0, 1024)
#define _tile_loadd(tile, from, stride) emulated::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::store(tile, to, stride)
#define _tile_dpbf16ps(sums, a, b) emulated::multiply(sums, a, b)
#define _tile_loadconfig(config) (void)(config)
#define _tile_release() (void)0
#define syscall(...) 0L  // the right to use tiles is given
