/* The kernels for ARM processors with products of matrices of bytes (Armv8.6: Graviton 3, Apple M2). */
#include "common.h"

#ifdef HAS_I8MM
#include <arm_neon.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>

#define KERNELS kernels_i8mm
#define INSTRUCTION_SET "i8mm"
#define DOTPROD
#define I8MM
#define ALSO EXTENSIONS("+dotprod+i8mm")
#include "simd_neon.h"

#include "layer.h"
#endif
