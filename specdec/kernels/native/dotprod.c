/* The kernels for ARM processors with dot products of bytes (Armv8.2 and later: since 2018, all of Apple's). */
#include "common.h"

#ifdef HAS_DOTPROD
#include <arm_neon.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>

#define KERNELS kernels_dotprod
#define INSTRUCTION_SET "dotprod"
#define DOTPROD
#define ALSO EXTENSIONS("+dotprod")
#include "simd_neon.h"

#include "layer.h"
#endif
