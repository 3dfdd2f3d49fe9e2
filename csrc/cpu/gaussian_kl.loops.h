// The loops of gaussian_kl.cpp, which includes them once per instruction set.

namespace fastelbo::FASTELBO_ISA {

#include "gaussians_tile.h"

template <class T, bool exponential>
void gaussian_kl_fwd(const GaussianOperands& args, int64_t begin, int64_t end) {
  using V = typename VectorOf<T>::type;
  GaussiansTile<T, exponential, Ratio::gap, kNoMore> both(args);
  T kl_tile[kTile];
  for (int64_t index = begin; index < end; ++index) {
    Tile tile = args.tiling[index];
    both.read(tile.start, tile.count);
    T* kl = output_terms(*args.kl, tile, kl_tile);
    both.each([&](int i, auto part, const Spread<V, exponential>&, const GaussianKL<V>& found)
                  FASTELBO_LAMBDA { store(kl + i, found.value, part); });
    both.select(kl);
    finish_terms(*args.kl, args.tiling, tile, kl, kl_tile);
  }
}

template <class T, bool exponential>
void gaussian_kl_bwd(const GaussianOperands& args, int64_t begin, int64_t end) {
  using V = typename VectorOf<T>::type;
  GaussiansTile<T, exponential, Ratio::e, kLogSlope> both(args);
  for (int64_t index = begin; index < end; ++index) {
    Tile tile = args.tiling[index];
    both.read(tile.start, tile.count);
    both.gradients([&](int, auto, V to_q, const Spread<V, exponential>&, const GaussianKL<V>& kl)
                       FASTELBO_LAMBDA { return std::pair(to_q * kl.d_mean_q, to_q * kl.d_s_q); });
  }
}

}  // namespace fastelbo::FASTELBO_ISA
