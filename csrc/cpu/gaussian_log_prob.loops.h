// The loops of gaussian_log_prob.cpp, which includes them once per instruction set.

namespace fastelbo::FASTELBO_ISA {

// One sigma for all elements, whose inverse is taken once.
template <class V, bool is_exponential>
struct OneSpread : Spread<V, is_exponential> {
  Inverse<V> inverse;

  FASTELBO_INLINE explicit OneSpread(const Spread<V, is_exponential>& spread)
      : Spread<V, is_exponential>(spread), inverse(spread.log_std) {}
  FASTELBO_INLINE V divide(V x) const {
    if constexpr (is_exponential) return inverse.times(x);
    return Spread<V, is_exponential>::divide(x);
  }
};

// Calls loop(raw_at, spread_at): functions from a position in the tile to the raw scale there and to what it means.
template <class T, bool exponential, int needs, class Loop>
FASTELBO_INLINE void with_scale(const ScaleOf<T>& scale, bool one_s, const T* s, int n,
                                SpreadTile<T, exponential, needs>& ahead, Loop&& loop) {
  using V = typename VectorOf<T>::type;
  if (one_s) {
    V raw(*s);
    OneSpread<V, exponential> fixed(spread<exponential>(scale, raw));
    loop([&](int, auto) FASTELBO_LAMBDA { return raw; }, [&](int, auto) FASTELBO_LAMBDA { return fixed; });
  } else {
    ahead.read(scale, s, n);
    loop([&](int i, auto part) FASTELBO_LAMBDA { return load(s + i, part); },
         [&](int i, auto part) FASTELBO_LAMBDA { return ahead.at(scale, s, i, part); });
  }
}

template <class T, bool exponential>
void gaussian_log_prob_fwd(const GaussianLogProb& args, int64_t begin, int64_t end) {
  using V = typename VectorOf<T>::type;
  const ScaleOf<T> scale(args.scale);  // a copy, which no store to a tensor can change
  T x_tile[kTile], mean_tile[kTile], s_tile[kTile], out_tile[kTile];
  SpreadTile<T, exponential, kLogStd> p_at;
  MaskTile<T> kept;
  for (int64_t index = begin; index < end; ++index) {
    Tile tile = args.tiling[index];
    int64_t start = tile.start;
    int n = tile.count;
    const T* x = read_tile(args.x, start, n, x_tile);
    const T* mean = read_tile(args.mean, start, n, mean_tile);
    const T* s = read_tile(args.s, start, n, s_tile);
    T* out = output_terms(*args.log_prob, tile, out_tile);
    V sign(args.sign), weight(args.log_weight), constant(args.constant);
    with_scale(scale, args.one_s, s, n, p_at, [&](auto, auto spread_at) FASTELBO_LAMBDA {
      for_each_vector<T>(n, [&](int i, auto part) FASTELBO_LAMBDA {
        V delta = load(x + i, part) - load(mean + i, part);
        store(out + i, sign * gaussian_nll(delta, spread_at(i, part), weight, constant).value, part);
      });
    });
    kept.read(args.mask, start, n);
    kept.select(n, out);
    finish_terms(*args.log_prob, args.tiling, tile, out, out_tile);
  }
}

template <class T, bool exponential>
void gaussian_log_prob_bwd(const GaussianLogProb& args, int64_t begin, int64_t end) {
  using V = typename VectorOf<T>::type;
  const ScaleOf<T> scale(args.scale);  // a copy, which no store to a tensor can change
  T x_tile[kTile], mean_tile[kTile], s_tile[kTile], d_out_tile[kTile], d_x_tile[kTile], d_mean_tile[kTile],
      d_s_tile[kTile];
  SpreadTile<T, exponential, kLogStdOfWild | kLogSlope> p_at;
  MaskTile<T> kept;
  for (int64_t index = begin; index < end; ++index) {
    auto [start, n, row, rows] = args.tiling[index];
    const T* x = read_tile(args.x, start, n, x_tile);
    const T* mean = read_tile(args.mean, start, n, mean_tile);
    const T* s = read_tile(args.s, start, n, s_tile);
    const T* d_out = read_tile(args.d_out, start, n, d_out_tile);
    bool x_grad(args.d_x);
    T* d_x = x_grad ? output(args.d_x, start, n, d_x_tile) : d_x_tile;
    T* d_mean = output(args.d_mean, start, n, d_mean_tile);
    T* d_s = args.d_s ? output(args.d_s, start, n, d_s_tile) : d_s_tile;
    V sign(args.sign), weight(args.log_weight);
    with_scale(scale, args.one_s, s, n, p_at, [&](auto raw_at, auto spread_at) FASTELBO_LAMBDA {
      for_each_vector<T>(n, [&](int i, auto part) FASTELBO_LAMBDA {
        V raw = raw_at(i, part), upstream = sign * load(d_out + i, part);
        auto p = spread_at(i, part);
        GaussianNLL<V> nll = gaussian_nll(load(x + i, part) - load(mean + i, part), p, weight);
        V d_delta = upstream * nll.d_x;
        if (x_grad) store(d_x + i, d_delta, part);
        store(d_mean + i, -d_delta, part);
        store(d_s + i, clamp_gradient(scale, raw, upstream * nll.d_s), part);
      });
    });
    kept.read(args.mask, start, n);
    kept.select(n, d_mean, d_s);
    if (x_grad) {
      kept.select(n, d_x);
      finish(args.d_x, start, n, d_x, d_x_tile);
    }
    finish(args.d_mean, start, n, d_mean, d_mean_tile);
    if (args.d_s_partial)
      args.d_s_partial[index] = sum(d_s, n);
    else
      finish(args.d_s, start, n, d_s, d_s_tile);
  }
}

}  // namespace fastelbo::FASTELBO_ISA
