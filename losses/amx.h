/* What the blocks on Intel's matrix unit (AMX) share: its set-up, transposition, and adding 32 x 32 to a matrix. The
   unit has eight registers ("tiles") of 16 rows of 64 bytes. */
#include "terms.h"

#if defined(__AMX_TILE__) && defined(__AVX512F__) && defined(__linux__)
#include <immintrin.h>
#include <omp.h>
#include <stdlib.h>

#define EDGE 32 /* of what is worked on at once: 2 x 2 of the unit's registers */
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define INLINE static inline __attribute__((always_inline))

typedef __m512i Rows[16];

static inline void configure_tiles(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
}

/* The sums of 32 x 32 numbers of 4 bytes are in registers 0 to 3. */
static inline void product_begin(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

static inline void product_end(void *out) {
    char *to = out;
    _tile_stored(0, to, 4 * EDGE);
    _tile_stored(1, to + 64, 4 * EDGE);
    _tile_stored(2, to + 64 * EDGE, 4 * EDGE);
    _tile_stored(3, to + 64 * EDGE + 64, 4 * EDGE);
}

/* 16 x 16 words of 32 bits */
INLINE void transpose(__m512i *r) {
    Rows t;
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

static inline void prefetch_block(const float *out, int64_t rows, int64_t stride) {
    for (int64_t i = 0; i < MIN(rows, EDGE); i++) {
        _mm_prefetch((const char *)(out + i * stride), _MM_HINT_T1);
        _mm_prefetch((const char *)(out + i * stride + 16), _MM_HINT_T1);
    }
}

/* 32 x 32 numbers into a matrix of rows x columns that may end before. Loads go some rows ahead of stores: rows that
   lie a multiple of 4096 bytes apart would wait for each other. */
static inline void add_block(const float *block, float *out, int64_t rows, int64_t columns, int64_t stride, int overwrite) {
    enum { AHEAD = 8 };
    for (int half = 0; half < 2; half++) {
        int64_t left = columns - 16 * half;
        __mmask16 mask = left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
        for (int64_t top = 0; top < MIN(rows, EDGE); top += AHEAD) {
            __m512 sum[AHEAD];
            for (int64_t i = 0; i < AHEAD; i++) {
                sum[i] = _mm512_load_ps(block + (top + i) * EDGE + 16 * half);
                if (!overwrite && top + i < rows)
                    sum[i] += _mm512_maskz_loadu_ps(mask, out + (top + i) * stride + 16 * half);
            }
            for (int64_t i = 0; i < AHEAD; i++)
                if (top + i < rows) _mm512_mask_storeu_ps(out + (top + i) * stride + 16 * half, mask, sum[i]);
        }
    }
}
#endif
