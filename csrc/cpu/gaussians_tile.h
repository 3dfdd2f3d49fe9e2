// A tile of both Gaussians of a KL divergence: what forward and backward passes of all its ops do with them. Included
// inside a namespace, once per instruction set (per_isa.h).

// part_of: what of the ratio of sigmas the pass uses; needs: what more of q's spread.
template <class T, bool exponential, Ratio part_of, int needs>
class GaussiansTile {
 public:
  using V = typename VectorOf<T>::type;
  using SpreadOf = Spread<V, exponential>;

  const T* mean_q;

  explicit GaussiansTile(const GaussianOperands& args)
      : args(args), scale(args.scale), scale_p(args.scale_p), same(args.scale.same(args.scale_p)) {}

  void read(int64_t start, int n) {
    this->start = start, this->n = n;
    mean_q = read_tile(args.mean_q, start, n, mean_q_tile);
    s_q = read_tile(args.s_q, start, n, s_q_tile);
    kept.read(args.mask, start, n);
    if (!args.mean_p) {
      q_alone.read(scale, s_q, n);
      ratio.read(scale, s_q, q_alone, n);
    } else {
      mean_p = read_tile(args.mean_p, start, n, mean_p_tile);
      s_p = read_tile(args.s_p, start, n, s_p_tile);
      q_at.read(scale, s_q, n);
      p_at.read(scale_p, s_p, n);
      ratio.read(scale, scale_p, same, s_q, q_at, s_p, p_at, n);
    }
  }

  // Calls f(i, Whole or Part, the spread of q, the divergence and its slopes).
  template <class F>
  FASTELBO_INLINE void each(F&& f) const {
    const ScaleOf<T> scale = this->scale, scale_p = this->scale_p;  // copies, which no store to a tensor can change
    if (!args.mean_p) {
      for_each_vector<T>(n, [&](int i, auto part) FASTELBO_LAMBDA {
        SpreadOf q = q_alone.at(scale, s_q, i, part);
        f(i, part, q, gaussian_kl(load(mean_q + i, part), ratio.at(i, part, q), q));
      });
    } else {
      for_each_vector<T>(n, [&](int i, auto part) FASTELBO_LAMBDA {
        SpreadOf q = q_at.at(scale, s_q, i, part), p = p_at.at(scale_p, s_p, i, part);
        f(i, part, q, gaussian_kl(load(mean_q + i, part) - load(mean_p + i, part), ratio.at(i, part, q, p), q, p));
      });
    }
  }

  // Writes the gradients: f(i, Whole or Part, what reaches q of the divergence's, the spread of q, the divergence)
  // returns those by mean_q and by q's raw value inside its clamp.
  template <class F>
  FASTELBO_INLINE void gradients(F&& f) {
    const ScaleOf<T> scale = this->scale, scale_p = this->scale_p;
    const T* d_kl = read_tile(args.d_kl, start, n, d_kl_tile);
    const bool prior(args.d_mean_p);
    T* d_mean_q = output(args.d_mean_q, start, n, d_mean_q_tile);
    T* d_s_q = output(args.d_s_q, start, n, d_s_q_tile);
    T* d_mean_p = prior ? output(args.d_mean_p, start, n, d_mean_p_tile) : d_mean_p_tile;
    T* d_s_p = prior ? output(args.d_s_p, start, n, d_s_p_tile) : d_s_p_tile;
    const V share_q(args.share.q), share_p(args.share.p);
    const bool given(args.mean_p);
    each([&](int i, auto part, const SpreadOf& q, const GaussianKL<V>& kl) FASTELBO_LAMBDA {
      V upstream = load(d_kl + i, part);
      auto [d_mean, d_s] = f(i, part, share_q * upstream, q, kl);
      store(d_mean_q + i, d_mean, part);
      store(d_s_q + i, clamp_gradient(scale, load(s_q + i, part), d_s), part);
      if (!given) return;
      V to_p = share_p * upstream;
      store(d_mean_p + i, -to_p * kl.d_mean_q, part);
      store(d_s_p + i, clamp_gradient(scale_p, load(s_p + i, part), to_p * kl.d_s_p), part);
    });
    kept.select(n, d_mean_q, d_s_q);
    finish(args.d_mean_q, start, n, d_mean_q, d_mean_q_tile);
    finish(args.d_s_q, start, n, d_s_q, d_s_q_tile);
    if (!prior) return;
    kept.select(n, d_mean_p, d_s_p);
    finish(args.d_mean_p, start, n, d_mean_p, d_mean_p_tile);
    finish(args.d_s_p, start, n, d_s_p, d_s_p_tile);
  }

  template <class... Values>
  void select(Values*... tiles) const {
    kept.select(n, tiles...);
  }

 private:
  const GaussianOperands& args;
  const ScaleOf<T> scale, scale_p;
  const bool same;
  int64_t start;
  int n;
  const T *s_q, *mean_p, *s_p;
  T mean_q_tile[kTile], s_q_tile[kTile], mean_p_tile[kTile], s_p_tile[kTile], d_kl_tile[kTile];
  T d_mean_q_tile[kTile], d_s_q_tile[kTile], d_mean_p_tile[kTile], d_s_p_tile[kTile];
  SpreadTile<T, exponential, kLogStdOfWild | needs | kExcess> q_alone;
  SpreadTile<T, exponential, kLogStdOfWild | needs | kOwn | kRest> q_at;
  SpreadTile<T, exponential, kLogStdOfWild | (needs & kLogSlope) | kOwn | kOwnSlope | kRest> p_at;
  RatioTile<T, exponential, part_of> ratio;
  MaskTile<T> kept;
};
