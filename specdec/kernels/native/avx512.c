/* The kernels for processors with AVX-512 with VNNI. */
#include "common.h"

#ifdef __x86_64__
#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <stdlib.h>

#define KERNELS kernels_avx512
#define INSTRUCTION_SET "avx512"
#include "simd_avx512.h"

#include "layer.h"
#endif
