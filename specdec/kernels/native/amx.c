/* The kernels for processors with AVX-512 with VNNI and AMX: products of int8 weights with many rows go over tiles. */
#include "common.h"

#ifdef HAS_AMX
#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <stdlib.h>

#define KERNELS kernels_amx
#define INSTRUCTION_SET "amx"
#define ALSO ",amx-tile,amx-int8"
#include "simd_avx512.h"

#include "simd_amx.h"

#include "layer.h"
#endif
