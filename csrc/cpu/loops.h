// What every op's loops are made of, in dependency order. Included inside a namespace, once per instruction set.
#include "vec.h"
#include "../common/elementary.h"
#include "../common/philox.h"
#include "../common/scale.h"
#include "../common/gaussian_math.h"
#include "tile.h"
#include "scale_tile.h"
#include "noise.h"
