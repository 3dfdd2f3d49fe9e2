// What every op's loops are made of, in dependency order. Included inside a namespace, once per instruction set.
#include "vec.h"
#include "../math/elementary.h"
#include "../math/philox.h"
#include "../math/scale.h"
#include "../math/gaussian_math.h"
#include "tile.h"
#include "scale_tile.h"
#include "noise.h"
