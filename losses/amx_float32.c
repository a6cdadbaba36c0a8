/* A whole block of the sigmoid loss on float32 features, for processors with AMX: as amx_bfloat16.c, with products of
   float32 numbers made of products of 8-bit integers, which the matrix unit takes 32 at a time and adds without rounding
   (the "Ozaki scheme", arXiv 2306.11975).

   A number becomes an integer of 24 bits, x = factor * q, and that three digits, q = 2^16 d0 + 2^8 d1 + d2, each from
   -128 to 127. The factor, a power of two, is that of the largest number in its row (of a left matrix) or column (of a
   right one), so it leaves the sum:

       sum_k x_ik y_kj = factor_i factor_j (2^32 sum d0 e0 + 2^24 sum (d0 e1 + d1 e0) + 2^16 sum (d0 e2 + d1 e1 + d2 e0))

   with the sums as integers, added as float32. The three products of lower order are left out: they are below 2^-24 of
   the largest terms, of any sign, as roundings of a float32 sum are. Six products of digits take 3/16 of the unit's time
   that ... */
#include "amx.h"

#if defined(__AMX_INT8__) && defined(__AVX512BW__) && defined(__AVX512VBMI__) && defined(__linux__)
#define TILE 1024 /* bytes of a tile */
#define DIGITS 3
#define PRODUCTS 6
#define DEPTH 64 /* of the sum that one tile takes */
#ifndef IMAGES
#define IMAGES 512
#endif
#ifndef TEXTS
#define TEXTS 512
#endif
#define MAX_DIM 32768 /* three products of so many digits fit into 32 bits */
#define BLOCK (EDGE * EDGE)

_Static_assert(2 * TEXTS / EDGE <= MAX_TERMS, "a strip's sums are folded at its end");

/* 32 rows of a left factor or 32 columns of a right one: for each digit two sequences of tiles, `half` bytes apart. */
typedef struct {
    int8_t *tiles;
    int64_t half, digit;
} Operand;

static Operand moved(Operand operand, int64_t bytes) {
    operand.tiles += bytes;
    return operand;
}

/* `groups` of 32 rows or columns, one after another, with sums of `steps` tiles. */
static Operand operand_at(int8_t *memory, int64_t steps) { return (Operand){memory, steps * TILE, 2 * steps * TILE}; }
static int64_t group_size(int64_t steps) { return DIGITS * 2 * steps * TILE; }

/* A product of 32 x 32 on its way. */
typedef struct {
    Operand a, b;
    int64_t steps, k;
    int product, quarter;
    int32_t *out; /* (3, 32, 32): sums of digits by order */
} Work;

static inline Work begin(Operand a, Operand b, int64_t steps, int32_t *out) {
    product_begin();
    return (Work){a, b, steps, 0, 0, 0, out};
}

INLINE void quad(const int8_t *left, int64_t left_half, const int8_t *right, int64_t right_half, int quarter) {
    switch (quarter) {
    case 0:
        _tile_loadd(4, left, 64);
        _tile_stream_loadd(6, right, 64);
        _tile_dpbssd(0, 4, 6);
        break;
    case 1:
        _tile_stream_loadd(7, right + right_half, 64);
        _tile_dpbssd(1, 4, 7);
        break;
    case 2:
        _tile_loadd(5, left + left_half, 64);
        _tile_dpbssd(2, 5, 6);
        break;
    case 3:
        _tile_dpbssd(3, 5, 7);
    }
}

static const uint8_t LEFT_DIGIT[PRODUCTS] = {0, 0, 1, 0, 1, 2}, RIGHT_DIGIT[PRODUCTS] = {0, 1, 0, 2, 1, 0};
static const uint8_t ORDER[PRODUCTS] = {0, 1, 1, 2, 2, 2};

/* The sum of one product of digits is behind it: where it is the last of its order, it is stored. */
static inline void next_product(Work *work) {
    int order = ORDER[work->product++];
    if (work->product < PRODUCTS && ORDER[work->product] == order) return;
    product_end(work->out + order * BLOCK);
    if (work->product < PRODUCTS) product_begin();
}

INLINE void advance(Work *work) {
    const int8_t *left = work->a.tiles + LEFT_DIGIT[work->product] * work->a.digit + work->k * TILE;
    const int8_t *right = work->b.tiles + RIGHT_DIGIT[work->product] * work->b.digit + work->k * TILE;
    quad(left, work->a.half, right, work->b.half, work->quarter);
    if (++work->quarter < 4) return;
    work->quarter = 0;
    if (++work->k < work->steps) return;
    work->k = 0;
    next_product(work);
}

static void finish(Work *work) {
    while (work->product < PRODUCTS && (work->quarter || work->k)) advance(work);
    while (work->product < PRODUCTS) {
        const int8_t *left = work->a.tiles + LEFT_DIGIT[work->product] * work->a.digit;
        const int8_t *right = work->b.tiles + RIGHT_DIGIT[work->product] * work->b.digit;
        for (int64_t k = 0; k < work->steps; k++, left += TILE, right += TILE)
            for (int quarter = 0; quarter < 4; quarter++) quad(left, work->a.half, right, work->b.half, quarter);
        next_product(work);
    }
}

/* Sums of digits by order -> 32 x 32 numbers. */
static void combine(const int32_t *sums, const float *row_factors, const float *column_factors, float *out) {
    for (int half = 0; half < 2; half++) {
        __m512 columns = _mm512_loadu_ps(column_factors + 16 * half);
        for (int i = 0; i < EDGE; i++) {
            const int32_t *from = sums + i * EDGE + 16 * half;
            __m512 high = _mm512_cvtepi32_ps(_mm512_load_si512(from));
            __m512 middle = _mm512_cvtepi32_ps(_mm512_load_si512(from + BLOCK));
            __m512 low = _mm512_cvtepi32_ps(_mm512_load_si512(from + 2 * BLOCK));
            __m512 sum = high * _mm512_set1_ps(0x1p32f) + (middle * _mm512_set1_ps(0x1p24f) + low * _mm512_set1_ps(0x1p16f));
            _mm512_store_ps(out + i * EDGE + 16 * half, sum * (columns * _mm512_set1_ps(row_factors[i])));
        }
    }
}

INLINE __m512i magnitude(__m512 x) { return _mm512_and_si512((__m512i)x, _mm512_set1_epi32(0x7fffffff)); }

/* Of the bits of 16 largest magnitudes: the powers of two that make integers of 24 bits of such numbers, and back. Three
   digits reach to 0x7f7f7f; what is above goes into the next power. Infinity and NaN make the way back NaN. */
INLINE void scales_of(__m512i largest, float *up, float *down) {
    const __m512i one = _mm512_set1_epi32(127);
    __m512i exponent = _mm512_srli_epi32(_mm512_add_epi32(largest, _mm512_set1_epi32(0x010101)), 23);
    __m512i k = _mm512_min_epi32(_mm512_sub_epi32(_mm512_set1_epi32(149), exponent), _mm512_set1_epi32(126));
    __mmask16 not_finite = _mm512_cmpge_epi32_mask(largest, _mm512_set1_epi32(0x7f800000));
    __m512 back = (__m512)_mm512_slli_epi32(_mm512_sub_epi32(one, k), 23);
    _mm512_storeu_ps(up, (__m512)_mm512_slli_epi32(_mm512_add_epi32(one, k), 23));
    _mm512_storeu_ps(down, _mm512_mask_blend_ps(not_finite, back, _mm512_set1_ps(NAN)));
}

/* Bytes 2, 1 and 0 of a word are the digits. */
INLINE __m512i digits_of(__m512 x, __m512 up) {
    const __m512i middle = _mm512_set1_epi32(0x808080);
    return _mm512_xor_si512(_mm512_add_epi32(_mm512_cvtps_epi32(x * up), middle), middle);
}

#define FOUR(F, n) F(n), F(n + 1), F(n + 2), F(n + 3)
#define SIXTEEN(F, n) FOUR(F, n), FOUR(F, n + 4), FOUR(F, n + 8), FOUR(F, n + 12)
#define BYTES_64(F) {SIXTEEN(F, 0), SIXTEEN(F, 16), SIXTEEN(F, 32), SIXTEEN(F, 48)}
/* Of two vectors of 16 words: 32 first digits, then 32 second ones; 32 third ones. */
#define IN_A_ROW(n) 4 * ((n) % 32) + 2 - (n) / 32
#define IN_A_ROW_LAST(n) 4 * ((n) % 32)
/* The same, with the digits of both vectors by turns. */
#define BY_TURNS(n) 4 * ((n) % 32 / 2) + 64 * ((n) % 2) + 2 - (n) / 32
#define BY_TURNS_LAST(n) 4 * ((n) % 32 / 2) + 64 * ((n) % 2)
/* Of two vectors of 32 pairs of bytes: the first 16 by turns; the last 16. */
#define PAIRS_BY_TURNS(n) (n) / 2 + 32 * ((n) % 2)
static const uint8_t in_a_row[64] __attribute__((aligned(64))) = BYTES_64(IN_A_ROW);
static const uint8_t in_a_row_last[64] __attribute__((aligned(64))) = BYTES_64(IN_A_ROW_LAST);
static const uint8_t by_turns[64] __attribute__((aligned(64))) = BYTES_64(BY_TURNS);
static const uint8_t by_turns_last[64] __attribute__((aligned(64))) = BYTES_64(BY_TURNS_LAST);
static const uint16_t pairs_by_turns[32] __attribute__((aligned(64))) = {SIXTEEN(PAIRS_BY_TURNS, 0),
                                                                          SIXTEEN(PAIRS_BY_TURNS, 16)};

/* 64 numbers of a row -> their first digits, their second and their third ones. */
INLINE void split_row(const __m512i *words, __m512i *out) {
    const __m512i index = _mm512_load_si512(in_a_row), last = _mm512_load_si512(in_a_row_last);
    __m512i left = _mm512_permutex2var_epi8(words[0], index, words[1]);
    __m512i right = _mm512_permutex2var_epi8(words[2], index, words[3]);
    out[0] = _mm512_shuffle_i64x2(left, right, 0x44);
    out[1] = _mm512_shuffle_i64x2(left, right, 0xee);
    left = _mm512_permutex2var_epi8(words[0], last, words[1]);
    right = _mm512_permutex2var_epi8(words[2], last, words[3]);
    out[2] = _mm512_shuffle_i64x2(left, right, 0x44);
}

/* 4 rows of 16 columns -> for each digit the row of a B tile, with the four of a column side by side. */
INLINE void split_column(const __m512i *words, __m512i *out) {
    const __m512i index = _mm512_load_si512(by_turns), last = _mm512_load_si512(by_turns_last);
    const __m512i pairs = _mm512_load_si512(pairs_by_turns);
    __m512i first = _mm512_permutex2var_epi8(words[0], index, words[1]);
    __m512i second = _mm512_permutex2var_epi8(words[2], index, words[3]);
    out[0] = _mm512_permutex2var_epi16(first, pairs, second);
    out[1] = _mm512_permutex2var_epi16(first, _mm512_add_epi16(pairs, _mm512_set1_epi16(16)), second);
    first = _mm512_permutex2var_epi8(words[0], last, words[1]);
    second = _mm512_permutex2var_epi8(words[2], last, words[3]);
    out[2] = _mm512_permutex2var_epi16(first, pairs, second);
}

INLINE void transpose_tile(int8_t *tile) {
    Rows r;
    for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(tile + 64 * i);
    transpose(r);
    for (int i = 0; i < 16; i++) _mm512_store_si512(tile + 64 * i, r[i]);
}

INLINE __mmask16 first_of(int64_t count) { return count >= 16 ? 0xffff : count > 0 ? (1u << count) - 1 : 0; }

/* (32 rows, D) of X as A tiles or, transposed, as the B tiles of X^T; the sum goes along D, the factors by rows. */
static void pack_along_rows(const float *features, int64_t rows, int64_t dim, Operand out, float *factors,
                            int transposed) {
    uint32_t largest[EDGE] = {};
    float up[EDGE];
    for (int64_t i = 0; i < MIN(rows, EDGE); i++) {
        __m512i most = _mm512_setzero_si512();
        for (int64_t column = 0; column < dim; column += 16)
            most = _mm512_max_epu32(
                most, magnitude(_mm512_maskz_loadu_ps(first_of(dim - column), features + i * dim + column)));
        largest[i] = _mm512_reduce_max_epu32(most);
    }
    for (int half = 0; half < EDGE; half += 16)
        scales_of(_mm512_loadu_si512(largest + half), up + half, factors + half);
    for (int half = 0; half < 2; half++)
        for (int64_t column = 0; column < dim; column += DEPTH) {
            int8_t *to = out.tiles + half * out.half + column / DEPTH * TILE;
            for (int64_t i = 0; i < 16; i++) {
                __m512i words[4], rows_of_tiles[DIGITS];
                for (int part = 0; part < 4; part++) {
                    int64_t start = column + 16 * part, row = 16 * half + i;
                    __mmask16 mask = row < rows ? first_of(dim - start) : 0;
                    words[part] = digits_of(_mm512_maskz_loadu_ps(mask, features + row * dim + start),
                                            _mm512_set1_ps(up[row]));
                }
                split_row(words, rows_of_tiles);
                for (int digit = 0; digit < DIGITS; digit++)
                    _mm512_store_si512(to + digit * out.digit + 64 * i, rows_of_tiles[digit]);
            }
            if (transposed)
                for (int digit = 0; digit < DIGITS; digit++) transpose_tile(to + digit * out.digit);
        }
}

/* 16 columns of (rows, D) of X as B tiles; the sum goes along rows, the factors by columns. */
static void pack_along_columns(const float *features, int64_t rows, int64_t columns, int64_t dim, int8_t *out,
                               int64_t digit_size, float *factors) {
    float up[16];
    __mmask16 mask = first_of(columns);
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = 0; i < rows; i++)
        most = _mm512_max_epu32(most, magnitude(_mm512_maskz_loadu_ps(mask, features + i * dim)));
    scales_of(most, up, factors);
    for (int64_t top = 0; top < rows; top += DEPTH)
        for (int p = 0; p < 16; p++) {
            __m512i words[4], rows_of_tiles[DIGITS];
            for (int i = 0; i < 4; i++) {
                int64_t row = top + 4 * p + i;
                words[i] = digits_of(_mm512_maskz_loadu_ps(row < rows ? mask : 0, features + row * dim),
                                     _mm512_loadu_ps(up));
            }
            split_column(words, rows_of_tiles);
            for (int digit = 0; digit < DIGITS; digit++)
                _mm512_store_si512(out + digit * digit_size + top / DEPTH * TILE + 64 * p, rows_of_tiles[digit]);
        }
}

/* dz of a pair of panels lies by stripes of 16 texts, `stripe` numbers after each other, with 16 numbers an image. */

/* dz of 32 images as A tiles; the sum goes along texts. */
static void pack_dz(const float *dz, int64_t stripe, int64_t stripes, const uint32_t *largest, Operand out,
                    float *factors) {
    float up[EDGE];
    for (int half = 0; half < EDGE; half += 16)
        scales_of(_mm512_loadu_si512(largest + half), up + half, factors + half);
    for (int64_t first = 0; first < stripes; first += 4)
        for (int64_t i = 0; i < EDGE; i++) {
            __m512i words[4], rows_of_tiles[DIGITS];
            for (int64_t part = 0; part < 4; part++) {
                __m512 x = first + part < stripes ? _mm512_load_ps(dz + (first + part) * stripe + 16 * i)
                                                  : _mm512_setzero_ps();
                words[part] = digits_of(x, _mm512_set1_ps(up[i]));
            }
            split_row(words, rows_of_tiles);
            for (int digit = 0; digit < DIGITS; digit++)
                _mm512_store_si512(out.tiles + digit * out.digit + i / 16 * out.half + first / 4 * TILE + i % 16 * 64,
                                   rows_of_tiles[digit]);
        }
}

/* dz of 32 texts, transposed, as A tiles; the sum goes along images. */
static void pack_dz_transposed(const float *dz, int64_t stripe, int64_t rows, const uint32_t *largest, int64_t strips,
                               int64_t next_strip, Operand out, float *factors) {
    for (int half = 0; half < 2; half++, dz += stripe) {
        float up[16];
        __m512i most = _mm512_setzero_si512();
        for (int64_t s = 0; s < strips; s++)
            most = _mm512_max_epu32(most, _mm512_loadu_si512(largest + s * next_strip + 16 * half));
        scales_of(most, up, factors + 16 * half);
        for (int64_t top = 0; top < rows; top += DEPTH) {
            int8_t *to = out.tiles + half * out.half + top / DEPTH * TILE;
            for (int64_t p = 0; p < 16; p++) {
                __m512i words[4], rows_of_tiles[DIGITS];
                for (int64_t i = 0; i < 4; i++) {
                    int64_t row = top + 4 * p + i;
                    words[i] = digits_of(row < rows ? _mm512_load_ps(dz + 16 * row) : _mm512_setzero_ps(),
                                         _mm512_loadu_ps(up));
                }
                split_column(words, rows_of_tiles);
                for (int digit = 0; digit < DIGITS; digit++)
                    _mm512_store_si512(to + digit * out.digit + 64 * p, rows_of_tiles[digit]);
            }
            for (int digit = 0; digit < DIGITS; digit++) transpose_tile(to + digit * out.digit);
        }
    }
}

/* Cosines of 32 images and 32 texts -> dz, and the largest of each image and text. */
static void block_terms(const float *x, float scale, float bias, Sums *sums, float *dz, int64_t stripe,
                        __m512i *largest_of_rows, uint32_t *largest_of_columns, Work *next) {
    int64_t quarters = 0, due = 0, all_quarters = next->steps * PRODUCTS * 4;
    __m512i columns[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int i = 0; i < EDGE; i++) {
        __m512i most = largest_of_rows[i];
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            for (due += all_quarters; 64 * quarters < due; quarters++) advance(next);
            __m512 x_half = _mm512_load_ps(x + i * EDGE + 16 * half);
            __m512 dz_half = (__m512)terms((Floats)x_half, scale, bias, sums + i);
            _mm512_store_ps(dz + half * stripe + 16 * i, dz_half);
            most = _mm512_max_epu32(most, magnitude(dz_half));
            columns[half] = _mm512_max_epu32(columns[half], magnitude(dz_half));
        }
        largest_of_rows[i] = most;
    }
    _mm512_storeu_si512(largest_of_columns, columns[0]);
    _mm512_storeu_si512(largest_of_columns + 16, columns[1]);
}

/* dz of a strip of images with a panel of texts, and their sums. Image i and text i + offset are a pair: their dz goes
   into pair_dz and is 0 in its place. */
static void strip_terms(Operand images, const float *image_factors, int64_t rows, Operand texts,
                        const float *text_factors, int64_t width, int64_t steps, float scale, float bias,
                        int64_t offset, float *sums, int64_t stride, float *dz, int64_t stripe, uint32_t *largest,
                        uint32_t *largest_of_columns, float *pair_dz) {
    int32_t products[2][DIGITS * BLOCK] __attribute__((aligned(64)));
    float x[BLOCK] __attribute__((aligned(64))), cosines[EDGE];
    Sums strip_sums[EDGE] = {};
    __m512i largest_of_rows[EDGE] = {};
    Work work = begin(images, texts, steps, products[0]);
    for (int64_t left = 0; left < width; left += EDGE) {
        int64_t columns = MIN(EDGE, width - left), shift = offset - left;
        int64_t first_pair = shift < 0 ? -shift : 0, last_pair = MIN(rows, columns - shift);
        finish(&work);
        combine(work.out, image_factors, text_factors + left, x);
        texts = moved(texts, group_size(steps));
        work = begin(images, texts, left + EDGE < width ? steps : 0, products[left / EDGE % 2 ^ 1]);
        if (columns < EDGE || rows < EDGE)
            for (int64_t i = 0; i < BLOCK; i++)
                if (i / EDGE >= rows || i % EDGE >= columns) x[i] = -INFINITY;
        for (int64_t i = first_pair; i < last_pair; i++) {
            cosines[i] = x[i * EDGE + i + shift];
            x[i * EDGE + i + shift] = -INFINITY;
        }
        block_terms(x, scale, bias, strip_sums, dz + left / 16 * stripe, stripe, largest_of_rows,
                    largest_of_columns + left, &work);
        for (int64_t i = first_pair; i < last_pair; i++)
            pair_dz[i] = pair_terms(cosines[i], scale, bias, sums + i, stride);
    }
    for (int64_t i = 0; i < rows; i++) add_sums(strip_sums + i, sums + i, stride);
    for (int64_t i = 0; i < EDGE; i++) largest[i] = _mm512_reduce_max_epu32(largest_of_rows[i]);
}

/* out, 32 x 32 or less of a matrix, += A . B, and the pairs' part: row i has pair_dz[i] * partners[i], for i from
   first_pair to last_pair. */
static void add_product(Operand a, const float *row_factors, Operand b, const float *column_factors, int64_t steps,
                        float *out, int64_t rows, int64_t columns, int64_t dim, int overwrite, const float *pair_dz,
                        const float *partners, int64_t first_pair, int64_t last_pair) {
    int32_t products[DIGITS * BLOCK] __attribute__((aligned(64)));
    float block[BLOCK] __attribute__((aligned(64)));
    prefetch_block(out, rows, dim);
    Work work = begin(a, b, steps, products);
    finish(&work);
    combine(products, row_factors, column_factors, block);
    for (int64_t i = first_pair; i < MIN(last_pair, EDGE); i++)
        for (int64_t d = 0; d < MIN(columns, EDGE); d++) block[i * EDGE + d] += pair_dz[i] * partners[i * dim + d];
    add_block(block, out, rows, columns, dim, overwrite);
}

#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define CEIL(a, b) (((a) + (b) - 1) / (b))

/* As block_bfloat16. */
int block_float32(const float *images, const float *texts, int64_t num_images, int64_t num_texts, int64_t dim,
                  float scale, float bias, int64_t offset, int64_t panel, float *sums, int64_t stride,
                  float *grad_images, int overwrite_images, float *grad_texts) {
    int64_t most_images = MIN(MIN(panel, IMAGES), num_images), most_texts = MIN(MIN(panel, TEXTS), num_texts);
    int64_t across = CEIL(most_images, EDGE), along = CEIL(most_texts, EDGE), dims = CEIL(dim, EDGE);
    int64_t dim_steps = CEIL(dim, DEPTH), stripe = 16 * EDGE * across;
    int64_t most_image_steps = CEIL(most_images, DEPTH), most_text_steps = CEIL(most_texts, DEPTH);
    int64_t strip_size = group_size(dim_steps), own_size = MAX(strip_size, group_size(most_image_steps));
    int64_t texts_size = along * strip_size, all_texts_size = dims * group_size(most_text_steps);
    int64_t all_images_size = dims * group_size(most_image_steps), dz_a_size = across * group_size(most_text_steps);
    int64_t dz_size = 4 * 2 * along * stripe;
    int64_t factors = along * EDGE + 2 * dims * EDGE + 2 * across * EDGE, largest = across * along * EDGE;
    int8_t *memory = aligned_alloc(64, texts_size + all_texts_size + all_images_size + dz_a_size + dz_size +
                                           omp_get_max_threads() * own_size + 4 * (factors + largest));
    if (!memory) return -1;
    int8_t *texts_by_dim = memory, *texts_by_text = texts_by_dim + texts_size;
    int8_t *images_by_image = texts_by_text + all_texts_size, *dz_by_text = images_by_image + all_images_size;
    float *dz = (float *)(dz_by_text + dz_a_size);
    int8_t *all_own = (int8_t *)dz + dz_size;
    float *text_factors = (float *)(all_own + omp_get_max_threads() * own_size);
    float *text_dim_factors = text_factors + along * EDGE, *image_dim_factors = text_dim_factors + dims * EDGE;
    float *dz_factors = image_dim_factors + dims * EDGE, *pair_dz = dz_factors + across * EDGE;
    uint32_t *largest_of_columns = (uint32_t *)(pair_dz + across * EDGE);
#pragma omp parallel
    {
        int8_t *own = all_own + omp_get_thread_num() * own_size;
        configure_tiles();
        for (int64_t top = 0; top < num_images; top += most_images) {
            int64_t height = MIN(most_images, num_images - top), strips = CEIL(height, EDGE);
            int64_t image_steps = CEIL(height, DEPTH);
#pragma omp for schedule(static)
            for (int64_t d = 0; d < 2 * dims; d++)
                pack_along_columns(images + top * dim + 16 * d, height, dim - 16 * d, dim,
                                   images_by_image + d / 2 * group_size(image_steps) + d % 2 * image_steps * TILE,
                                   2 * image_steps * TILE, image_dim_factors + 16 * d);
            for (int64_t left = 0; left < num_texts; left += most_texts) {
                int64_t width = MIN(most_texts, num_texts - left), groups = CEIL(width, EDGE);
                int64_t text_steps = CEIL(width, DEPTH), shift = top + offset - left;
                const float *panel_texts = texts + left * dim, *panel_images = images + top * dim;
#pragma omp for schedule(static) nowait
                for (int64_t g = 0; g < groups; g++)
                    pack_along_rows(panel_texts + 32 * g * dim, width - 32 * g, dim,
                                    operand_at(texts_by_dim + g * strip_size, dim_steps), text_factors + 32 * g, 1);
#pragma omp for schedule(static)
                for (int64_t d = 0; d < 2 * dims; d++)
                    pack_along_columns(panel_texts + 16 * d, width, dim - 16 * d, dim,
                                       texts_by_text + d / 2 * group_size(text_steps) + d % 2 * text_steps * TILE,
                                       2 * text_steps * TILE, text_dim_factors + 16 * d);
#pragma omp for schedule(static)
                for (int64_t s = 0; s < strips; s++) {
                    int64_t first = 32 * s, rows = MIN(EDGE, height - first);
                    float image_factors[EDGE];
                    uint32_t largest_of_rows[EDGE];
                    Operand strip = operand_at(own, dim_steps);
                    pack_along_rows(panel_images + first * dim, rows, dim, strip, image_factors, 0);
                    strip_terms(strip, image_factors, rows, operand_at(texts_by_dim, dim_steps), text_factors, width,
                                dim_steps, scale, bias, first + shift, sums + top + first, stride, dz + 16 * first,
                                stripe, largest_of_rows, largest_of_columns + s * along * EDGE, pair_dz + first);
                    pack_dz(dz + 16 * first, stripe, 2 * groups, largest_of_rows,
                            operand_at(dz_by_text + s * group_size(text_steps), text_steps), dz_factors + first);
                }
#pragma omp for schedule(static) nowait
                for (int64_t s = 0; s < strips; s++)
                    for (int64_t d = 0; d < dims; d++) {
                        int64_t first = 32 * s, column = 32 * d, partner = first + shift;
                        add_product(operand_at(dz_by_text + s * group_size(text_steps), text_steps), dz_factors + first,
                                    operand_at(texts_by_text + d * group_size(text_steps), text_steps),
                                    text_dim_factors + column, text_steps, grad_images + (top + first) * dim + column,
                                    height - first, dim - column, dim, overwrite_images && left == 0, pair_dz + first,
                                    panel_texts + partner * dim + column, MAX(0, -partner),
                                    MIN(height - first, width - partner));
                    }
#pragma omp for schedule(static)
                for (int64_t g = 0; g < groups; g++) {
                    float factors_of_columns[EDGE];
                    int64_t first = 32 * g, partner = first - shift;
                    Operand dz_by_image = operand_at(own, image_steps);
                    pack_dz_transposed(dz + 2 * g * stripe, stripe, 32 * strips, largest_of_columns + first, strips,
                                       along * EDGE, dz_by_image, factors_of_columns);
                    for (int64_t d = 0; d < dims; d++) {
                        int64_t column = 32 * d;
                        add_product(dz_by_image, factors_of_columns,
                                    operand_at(images_by_image + d * group_size(image_steps), image_steps),
                                    image_dim_factors + column, image_steps, grad_texts + (left + first) * dim + column,
                                    width - first, dim - column, dim, top == 0, pair_dz + partner,
                                    panel_images + partner * dim + column, MAX(0, -partner),
                                    MIN(width - first, height - partner));
                    }
                }
            }
        }
        _tile_release();
    }
    free(memory);
    return 0;
}
#endif
