// The noise (docs/noise.md), one Philox block a lane.
// Included inside a namespace, once per instruction set (per_isa.h).

constexpr int kNormals = 4 * kLanes;          // of one vector of blocks
constexpr int kGroup = 4, kGroupNormals = kGroup * kNormals;  // vectors of blocks that go through the rounds together

// The words of the blocks from first_block on, as floats. For each vector of blocks all first words, all second ones,
// ...
FASTELBO_INLINE void philox_words(const PhiloxKeys<Words>& keys, uint32_t sample, uint64_t first_block, float* words) {
  // Words hold every other lane each. The interleaving store works within 128 bits, so lane 4 L + k takes block
  // (lanes / 4) k + L: then the store lands in order.
  Words c0[2 * kGroup], c1[2 * kGroup], c2[2 * kGroup], c3[2 * kGroup];
  FASTELBO_UNROLL
  for (int half = 0; half < 2 * kGroup; ++half) {
    NativeW block;
    FASTELBO_UNROLL
    for (int i = 0; i < kLanes / 2; ++i) {
      int lane = 2 * i + half % 2;
      block[i] = half / 2 * kLanes + (kLanes / 4) * (lane % 4) + lane / 4;
    }
    block += first_block;
    c0[half] = Words(block);
    c1[half] = Words(block >> 32);
    c2[half] = Words(sample);
    c3[half] = Words(0u);
  }
  philox4x32_10<2 * kGroup>(c0, c1, c2, c3, keys);
  FASTELBO_UNROLL
  for (int half = 0; half < 2 * kGroup; half += 2) {
    float* out = words + half / 2 * kNormals;
    store(out, words_to_float(c0[half], c0[half + 1]), Whole{});
    store(out + kLanes, words_to_float(c1[half], c1[half + 1]), Whole{});
    store(out + 2 * kLanes, words_to_float(c2[half], c2[half + 1]), Whole{});
    store(out + 3 * kLanes, words_to_float(c3[half], c3[half + 1]), Whole{});
  }
}

// Turns those words into normals, in the order of the elements, in place.
FASTELBO_INLINE void words_to_normals(float* tile) {
  F32 n0, n1, n2, n3;
  box_muller(uniform(load(tile, Whole{})), uniform(load(tile + kLanes, Whole{})), n0, n1);
  box_muller(uniform(load(tile + 2 * kLanes, Whole{})), uniform(load(tile + 3 * kLanes, Whole{})), n2, n3);
  store_interleaved(tile, n0, n1, n2, n3);
}

constexpr int kNoiseScratch = kTile + 3 + kGroupNormals;

// The normals of elements first .. first + n - 1; returns where in scratch[kNoiseScratch] they start. Two loops,
// because each alone is short enough for the processor to overlap several of its turns.
inline const float* normals(uint64_t seed, uint32_t sample, uint64_t first, int n, float* scratch) {
  const PhiloxKeys<Words> keys(seed);
  int lead = int(first % 4);
  for (int done = 0; done < lead + n; done += kGroupNormals)
    philox_words(keys, sample, first / 4 + done / 4, scratch + done);
  for (int done = 0; done < lead + n; done += kNormals) words_to_normals(scratch + done);
  return scratch + lead;
}

// The same normals in the arithmetic type, or the noise that was given.
template <class T>
struct NoiseTile {
  float drawn[kNoiseScratch];
  T widened[kTile];

  const T* read(const Noise& noise, int64_t sample, int64_t start, int n, int64_t numel) {
    if (noise.given) return read_tile(noise.given, sample * numel + start, n, widened);
    const float* normal = normals(noise.seed, uint32_t(sample), uint64_t(noise.offset) + uint64_t(start), n, drawn);
    if constexpr (sizeof(T) == 4) {
      return normal;
    } else {
      std::copy(normal, normal + n, widened);
      return widened;
    }
  }
};

// What a tile's gradient needs of its samples: the sums over them of d_z and of d_z * noise. The second is the product
// of two arrays, so that a single sample needs no pass of its own.
template <class T>
struct SampleGradient {
  NoiseTile<T> noise_tile;
  T d_z_tile[kTile], d_z_total[kTile], noisy_total[kTile], ones[kTile];
  double sum[kTile], noisy_sum[kTile];

  const T *d_z, *noisy, *noisy_factor;

  void read(const Noise& noise, const Operand& d_z_operand, int64_t start, int n, int64_t numel) {
    if (noise.samples == 1) {
      d_z = noisy = read_tile(d_z_operand, start, n, d_z_tile);
      noisy_factor = noise_tile.read(noise, 0, start, n, numel);
      return;
    }
    std::fill(sum, sum + n, 0.0);
    std::fill(noisy_sum, noisy_sum + n, 0.0);
    for (int64_t sample = 0; sample < noise.samples; ++sample) {
      const T* upstream = read_tile(d_z_operand, sample * numel + start, n, d_z_tile);
      const T* normal = noise_tile.read(noise, sample, start, n, numel);
      for (int i = 0; i < n; ++i) {
        sum[i] += upstream[i];
        noisy_sum[i] += double(upstream[i]) * normal[i];
      }
    }
    std::copy(sum, sum + n, d_z_total);
    std::copy(noisy_sum, noisy_sum + n, noisy_total);
    std::fill(ones, ones + n, T(1));
    d_z = d_z_total;
    noisy = noisy_total;
    noisy_factor = ones;
  }
};
