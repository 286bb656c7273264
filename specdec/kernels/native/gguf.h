/* The blocks of GGUF files, whose codes and scales become packed weights as they are (layouts in product.h); those of the
 * files are in ggml's ggml-common.h. Scales of K-blocks are products of two numbers there and one 16-bit float here. */

/* The weights of one output in one block: up to 256, with a scale for every `share` of them. */
typedef struct {
    uint8_t codes[256];
    float scales[16], offsets[8];
} Block;

INLINE float load_half(const uint8_t *p) {
    uint16_t half;
    memcpy(&half, p, 2);
    return float_of_half(half);
}

/* The 6-bit scale and minimum i, 0..7, of the 12 bytes of a Q4_K or Q5_K block. */
INLINE void scale_and_minimum(const uint8_t *p, int i, int *scale, int *minimum) {
    *scale = i < 4 ? p[i] & 63 : (p[i + 4] & 15) | p[i - 4] >> 6 << 4;
    *minimum = i < 4 ? p[i + 4] & 63 : p[i + 4] >> 4 | p[i] >> 6 << 4;
}

/* Low and then high halves of 16 bytes, of each of which the fifth bit is in `high`. */
INLINE void read_codes5(const uint8_t *bytes, const uint8_t *high, uint8_t *codes) {
    uint32_t fifth;
    memcpy(&fifth, high, 4);
    for (int i = 0; i < 16; i++) {
        codes[i] = (uint8_t)((bytes[i] & 15) | (fifth >> i & 1) << 4);
        codes[i + 16] = (uint8_t)(bytes[i] >> 4 | (fifth >> (i + 16) & 1) << 4);
    }
}

INLINE void read_block(const int type, const uint8_t *p, Block *out) {
    if (type == Q4_0 || type == Q4_1 || type == Q5_0 || type == Q5_1) {
        const int has_minimum = type == Q4_1 || type == Q5_1, is_of_5 = type == Q5_0 || type == Q5_1;
        out->scales[0] = load_half(p);
        out->offsets[0] = has_minimum ? load_half(p + 2) : out->scales[0] * (is_of_5 ? -16.0f : -8.0f);
        p += has_minimum ? 4 : 2;
        if (is_of_5) {
            read_codes5(p + 4, p, out->codes);
        } else {
            for (int i = 0; i < 16; i++) out->codes[i] = p[i] & 15, out->codes[i + 16] = p[i] >> 4;
        }
    } else if (type == Q8_0) {
        out->scales[0] = out->scales[1] = load_half(p);
        for (int i = 0; i < 32; i++) out->codes[i] = p[2 + i] ^ 0x80;
    } else if (type == Q4_K || type == Q5_K) {
        const float d = load_half(p), least = load_half(p + 2);
        const uint8_t *fifth = p + 16, *bytes = type == Q5_K ? fifth + 32 : fifth;
        for (int i = 0; i < 8; i++) {
            int scale, minimum;
            scale_and_minimum(p + 4, i, &scale, &minimum);
            out->scales[i] = d * (float)scale, out->offsets[i] = -least * (float)minimum;
            for (int j = 0; j < 32; j++) {
                const int low = i % 2 ? bytes[i / 2 * 32 + j] >> 4 : bytes[i / 2 * 32 + j] & 15;
                out->codes[32 * i + j] = (uint8_t)(type == Q5_K ? low | (fifth[j] >> i & 1) << 4 : low);
            }
        }
    } else { /* Q6_K */
        const uint8_t *high = p + 128, *scales = p + 192;
        const float d = load_half(p + 208);
        for (int i = 0; i < 16; i++) out->scales[i] = d * (float)(int8_t)scales[i];
        for (int i = 0; i < 8; i++) /* of 32 weights */
            for (int j = 0; j < 32; j++) {
                const int low = p[i / 4 * 64 + i % 2 * 32 + j], two = high[i / 4 * 32 + j] >> i % 4 * 2 & 3;
                out->codes[32 * i + j] = (uint8_t)((i % 4 < 2 ? low & 15 : low >> 4) | two << 4);
            }
    }
}

/* The block of 16 outputs' place for scale or offset i of an output. Returns whether the number is too large for it. */
INLINE int store_half(int8_t *numbers, int i, int output, float x) {
    const uint16_t half = half_of_float(x);
    memcpy(numbers + 32 * i + 2 * output, &half, 2);
    return (half & 0x7c00) == 0x7c00;
}

/* `count` codes, 32 or 256, and what belongs to them, from input `at` of an output on. Returns how many numbers are too
 * large. */
INLINE int64_t write_block(const int bits, const Block *block, int count, int64_t at, int output, int8_t *packed) {
    int64_t too_large = 0;
    for (int done = 0; done < count; done += 32, at += 32) {
        int8_t *group = packed + at / GROUP * group_bytes(bits);
        const int half = at % GROUP / 32;
        const uint8_t *codes = block->codes + done;
        if (bits == 4)
            for (int i = 0; i < 16; i += 4) {
                uint32_t low, high;
                memcpy(&low, codes + i, 4), memcpy(&high, codes + 16 + i, 4);
                low |= high << 4;
                memcpy(group + 128 + 256 * half + 16 * i + 4 * output, &low, 4);
            }
        else
            for (int i = 0; i < 32; i += 4) memcpy(group + 128 + 512 * half + 16 * i + 4 * output, codes + i, 4);
        if (bits == BYTES6 || bits == BYTES8) {
            for (int i = 0; i < 2; i++)
                too_large += store_half(group, 2 * half + i, output, block->scales[done / 16 + i]);
        } else {
            too_large += store_half(group, half, output, block->scales[done / 32]);
            too_large += store_half(group + 64, half, output, block->offsets[done / 32]);
        }
    }
    return too_large;
}

typedef struct {
    const uint8_t *blocks;
    const int64_t *rows;
    int64_t type, n, k;
    int8_t *packed;
    int64_t *too_large;
} Repacking;

INLINE void repack_row(const int type, const int bits, const int count, const int bytes, const Repacking *r, int64_t n,
                       int8_t *packed) {
    const uint8_t *block = r->blocks + (r->rows ? r->rows[n] : n) * (r->k / count) * bytes;
    int64_t too_large = 0;
    Block read;
    for (int64_t at = 0; at < r->k; at += count, block += bytes) {
        read_block(type, block, &read);
        too_large += write_block(bits, &read, count, at, (int)(n % 16), packed);
    }
    if (too_large) __atomic_fetch_add(r->too_large, too_large, __ATOMIC_RELAXED);
}

TARGET static void repack_strip(void *context, int strip) {
    const Repacking *r = context;
    const int64_t first = (int64_t)strip * STRIP, groups = (r->k + GROUP - 1) / GROUP;
#define REPACK(type, bits, count, bytes)                                                                \
    case type: {                                                                                        \
        const int64_t block_bytes = groups * group_bytes(bits);                                         \
        memset(r->packed + first / 16 * block_bytes, 0, (size_t)(STRIP / 16 * block_bytes));            \
        for (int64_t n = first; n < r->n && n < first + STRIP; n++)                                     \
            repack_row(type, bits, count, bytes, r, n, r->packed + n / 16 * block_bytes);               \
        break;                                                                                          \
    }
    switch (r->type) {
        REPACK(Q4_0, 4, 32, 18)
        REPACK(Q4_1, 4, 32, 20)
        REPACK(Q5_0, BYTES5, 32, 22)
        REPACK(Q5_1, BYTES5, 32, 24)
        REPACK(Q8_0, BYTES8, 32, 34)
        REPACK(Q4_K, 4, 256, 144)
        REPACK(Q5_K, BYTES5, 256, 176)
        REPACK(Q6_K, BYTES6, 256, 210)
    }
#undef REPACK
}

static void repack(int64_t type, const uint8_t *blocks, const int64_t *rows, int64_t n, int64_t k, int8_t *packed,
                   int64_t *too_large) {
    Repacking r = {blocks, rows, type, n, k, packed, too_large};
    parallel_for(repack_strip, &r, (int)((n + STRIP - 1) / STRIP));
}
