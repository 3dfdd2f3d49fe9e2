// What a Scale says of a tile of raw values. An exponential one costs so little that it is worked out where it is used;
// any other is worked out a tile ahead, by a loop for each kind: all of them inside an op's loop would spill its
// registers. Included inside a namespace, once per instruction set (per_isa.h).

// What an op uses of a Spread beside sigma.
enum Needs {
  kNoMore = 0,
  kLogStd = 1,
  kLogStdOfWild = 2,
  kSlope = 4,  // of sigma
  kLogSlope = 8,  // of ln sigma^2
  kExcess = 16,
  kOwn = 32,
  kOwnSlope = 64,
  kRest = 128,
  kSampled = 256,  // its bits must be those of all other spreads
};

template <class T, bool exponential, int needs>
struct SpreadTile {
  using V = typename VectorOf<T>::type;

  T std[kTile], log_std[kTile], d_std[kTile], d_logvar[kTile], excess[kTile], own[kTile], own_slope[kTile], rest[kTile];
  bool by_log, tame;  // tame: no sigma needs its logarithm, and of kLogStdOfWild there is none

  void read(const ScaleOf<T>& scale, const T* raw, int n) {
    switch (scale.kind) {
      case Scale::logvar: return read_kind<Scale::logvar>(scale, raw, n);
      case Scale::log_std: return read_kind<Scale::log_std>(scale, raw, n);
      case Scale::std: return read_kind<Scale::std>(scale, raw, n);
      case Scale::var: return read_kind<Scale::var>(scale, raw, n);
      case Scale::softplus: return read_kind<Scale::softplus>(scale, raw, n);
    }
  }

  template <class Count>
  FASTELBO_INLINE Spread<V, false> at(const ScaleOf<T>&, const T*, int i, Count) const {
    Spread<V, false> out;
    out.std = load(std + i, Whole{});
    if (needs & (kLogStd | kLogStdOfWild)) out.log_std = load(log_std + i, Whole{});
    if (needs & kSlope) out.d_std = load(d_std + i, Whole{});
    if (needs & kLogSlope) out.d_logvar = load(d_logvar + i, Whole{});
    if (needs & kExcess) out.excess = load(excess + i, Whole{});
    if (needs & kOwn) out.own = load(own + i, Whole{});
    if (needs & kOwnSlope) out.own_slope = load(own_slope + i, Whole{});
    if (needs & kRest) out.rest = load(rest + i, Whole{});
    out.by_log = by_log;
    return out;
  }

 private:
  template <Scale::Kind kind>
  void read_kind(const ScaleOf<T>& given, const T* raw, int n) {
    const ScaleOf<T> scale = given;  // a copy, which no store to a tile can change
    by_log = needs & (kLogStd | kLogStdOfWild) && kind != Scale::std && kind != Scale::var && !scale.shifted();
    for_each_vector_of_tile<T>(n, [&](int i, Within part) FASTELBO_LAMBDA {
      constexpr Excess wanted = !(needs & kExcess) ? Excess::none
                                : needs & kSampled ? Excess::beside
                                                   : Excess::together;
      Spread<V, false> out = spread<false, wanted>(scale, load(raw + i, part), kind);
      store(std + i, out.std, Whole{});
      if (needs & kLogStd) store(log_std + i, out.log_std, Whole{});
      if (needs & kSlope) store(d_std + i, out.d_std, Whole{});
      if (needs & kLogSlope) store(d_logvar + i, out.d_logvar, Whole{});
      if (needs & kExcess) store(excess + i, out.excess, Whole{});
      if (needs & kOwn) store(own + i, out.own, Whole{});
      if (needs & kOwnSlope) store(own_slope + i, out.own_slope, Whole{});
      if (needs & kRest) store(rest + i, out.rest, Whole{});
    });
    if (!(needs & (kLogStd | kLogStdOfWild))) return;
    int wild = 0;
    for (int i = 0; i < n; ++i) wild |= (std[i] > kTameLowest) & (std[i] < kTameHighest) ? 0 : 1;
    tame = !wild;
    by_log = by_log && wild;
    if (needs & kLogStd) return;
    if (tame) {
      for_each_vector_of_tile<T>(n, [&](int i, Within) FASTELBO_LAMBDA { store(log_std + i, V(0), Whole{}); });
      return;
    }
    for_each_vector_of_tile<T>(n, [&](int i, Within part) FASTELBO_LAMBDA {
      store(log_std + i, spread<false, Excess::none>(scale, load(raw + i, part), kind).log_std, Whole{});
    });
  }
};

template <class T, int needs>
struct SpreadTile<T, true, needs> {
  using V = typename VectorOf<T>::type;

  void read(const ScaleOf<T>&, const T*, int) {}
  template <class Count>
  FASTELBO_INLINE Spread<V, true> at(const ScaleOf<T>& scale, const T* raw, int i, Count part) const {
    return spread<true>(scale, load(raw + i, part));
  }
};

// The RatioTerms of a tile, or what of them an op uses, the gap for values and e for gradients: of a spread that says
// kExcess against the standard normal, and of two that say kOwn, and p kOwnSlope.
enum class Ratio { gap, e };

template <class T, bool exponential, Ratio part_of>
struct RatioTile {
  using V = typename VectorOf<T>::type;

  T terms[kTile];

  template <class Q>
  void read(const ScaleOf<T>& scale, const T* s_q, const Q& q, int n) {
    auto each = [&](auto tame) FASTELBO_LAMBDA {
      for_each_vector_of_tile<T>(
          n, [&](int i, Within part) FASTELBO_LAMBDA { keep(ratio_terms(q.at(scale, s_q, i, part), tame), i); });
    };
    if (q.tame) return each(::std::true_type());
    each(::std::false_type());
  }
  template <class Q, class P>
  void read(const ScaleOf<T>& scale, const ScaleOf<T>& scale_p, bool same, const T* s_q, const Q& q, const T* s_p,
            const P& p, int n) {
    switch (same ? scale.kind : Scale::std) {  // of two kinds, only the standard deviations are compared
      case Scale::logvar: return read_kind<Scale::logvar>(scale, scale_p, same, s_q, q, s_p, p, n);
      case Scale::log_std: return read_kind<Scale::log_std>(scale, scale_p, same, s_q, q, s_p, p, n);
      case Scale::std: return read_kind<Scale::std>(scale, scale_p, same, s_q, q, s_p, p, n);
      case Scale::var: return read_kind<Scale::var>(scale, scale_p, same, s_q, q, s_p, p, n);
      case Scale::softplus: return read_kind<Scale::softplus>(scale, scale_p, same, s_q, q, s_p, p, n);
    }
  }

  template <class Count, class... Spreads>
  FASTELBO_INLINE RatioTerms<V> at(int i, Count, const Spreads&...) const {
    RatioTerms<V> out;
    (part_of == Ratio::gap ? out.gap : out.e) = load(terms + i, Whole{});
    return out;
  }

 private:
  template <Scale::Kind kind, class Q, class P>
  void read_kind(const ScaleOf<T>& given, const ScaleOf<T>& given_p, bool same, const T* s_q, const Q& q, const T* s_p,
                 const P& p, int n) {
    const ScaleOf<T> scale = given, scale_p = given_p;  // copies, which no store to a tile can change
    auto each = [&](auto tame) FASTELBO_LAMBDA {
      for_each_vector_of_tile<T>(n, [&](int i, Within part) FASTELBO_LAMBDA {
        keep(ratio_terms(scale, scale_p, same, load(s_q + i, part), q.at(scale, s_q, i, part), load(s_p + i, part),
                         p.at(scale_p, s_p, i, part), kind, tame),
             i);
      });
    };
    if (q.tame && p.tame) return each(::std::true_type());
    each(::std::false_type());
  }
  FASTELBO_INLINE void keep(const RatioTerms<V>& found, int i) {
    store(terms + i, part_of == Ratio::gap ? found.gap : found.e, Whole{});
  }
};

template <class T, Ratio part_of>
struct RatioTile<T, true, part_of> {
  using V = typename VectorOf<T>::type;

  template <class... Args>
  void read(const Args&...) {}
  template <class Count>
  FASTELBO_INLINE RatioTerms<V> at(int, Count, const Spread<V, true>& q) const {
    return ratio_terms(q, true);
  }
  template <class Count>
  FASTELBO_INLINE RatioTerms<V> at(int, Count, const Spread<V, true>& q, const Spread<V, true>& p) const {
    return RatioTerms<V>(q.log_std - p.log_std);
  }
};
