/* Tiles: registers of 16 rows of 64 bytes. A group of packed weights, [16][16 outputs][4], is one as it lies in memory. */
#define FEWEST_WIDE_ROWS 9 /* below, the vector units keep up with memory, and no sums have to go through it */

/* What the instruction for it reads; compilers do not know that it reads all of it, so that it has to lie there. */
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} all_tiles = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

/* A block of 16 outputs against a wide tile of rows: sums[row * STRIP + output], to the bit as dot_group adds them. The
 * integer sums of a group go through memory: three groups are multiplied ahead of the one that is added. The weights
 * at `next`, if there are any, are fetched meanwhile. */
INLINE void dot_tiles(const int8_t *w, const int8_t *next, const int8_t *x, const float *scales, int64_t groups,
                      float *sums) {
    int32_t products[4][WIDE_TILE][16] __attribute__((aligned(64)));
    VF total[WIDE_TILE];
    for (int m = 0; m < WIDE_TILE; m++) total[m] = vf_zero();
#define MULTIPLY(tile, place, group) /* compilers want the numbers of tiles as literals */ \
    if ((group) < groups) {                                                                \
        _tile_zero(tile);                                                                  \
        _tile_loadd(0, x + (group) * GROUP * WIDE_TILE, GROUP);                            \
        _tile_loadd(1, w + (group) * GROUP * 16, GROUP);                                   \
        _tile_dpbssd(tile, 0, 1);                                                          \
        _tile_stored(tile, products[place], GROUP);                                        \
        for (int i = 0; next && i < 16; i++) prefetch_l2(next + ((group) * 16 + i) * GROUP);\
    }
#define ADD(place, group)                                                    \
    if ((group) < groups)                                                    \
        for (int m = 0; m < WIDE_TILE; m++)                                  \
            total[m] = vf_fma(vf_from_int(vi_load(products[place][m])),      \
                              vf_set1(scales[(group) * WIDE_TILE + m]), total[m]);
    MULTIPLY(4, 0, 0)
    MULTIPLY(5, 1, 1)
    MULTIPLY(6, 2, 2)
    for (int64_t g = 0; g < groups; g += 4) {
        MULTIPLY(7, 3, g + 3)
        ADD(0, g)
        MULTIPLY(4, 0, g + 4)
        ADD(1, g + 1)
        MULTIPLY(5, 1, g + 5)
        ADD(2, g + 2)
        MULTIPLY(6, 2, g + 6)
        ADD(3, g + 3)
    }
#undef MULTIPLY
#undef ADD
    for (int m = 0; m < WIDE_TILE; m++) vf_store(sums + m * STRIP, total[m]);
}
