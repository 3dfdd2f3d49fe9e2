// Philox4x32-10, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (the published constants), and the
// Box-Muller map that turns its words into normals: the noise of every fastelbo backend (docs/noise.md).
//
// The files of math/ are templates over the type of one value: a float, a double or a vector of them. The includer
// supplies the elementary functions by overload and includes the file inside its own namespace (once per instruction
// set on the CPU, once for CUDA), so there is no include guard. The files of common/ are ordinary headers.

constexpr uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57;  // multipliers
constexpr uint32_t kPhiloxW0 = 0x9E3779B9, kPhiloxW1 = 0xBB67AE85;  // Weyl increments of the key

// The round keys of a seed: the same for every counter, so a loop over counters computes them once.
template <class Words>
struct PhiloxKeys {
  Words k0[10], k1[10];

  FASTELBO_INLINE explicit PhiloxKeys(uint64_t seed) {
    for (uint32_t round = 0; round < 10; ++round) {
      k0[round] = Words(uint32_t(seed) + round * kPhiloxW0);
      k1[round] = Words(uint32_t(seed >> 32) + round * kPhiloxW1);
    }
  }
};

// Encrypts n counters (c0[i], c1[i], c2[i], c3[i]) in place, round by round: they are independent, which hides the
// latency of the multiplications. Words needs ^ and multiply_wide(words, constant, &high, &low).
template <int n, class Words>
FASTELBO_INLINE void philox4x32_10(Words* c0, Words* c1, Words* c2, Words* c3, const PhiloxKeys<Words>& keys) {
  FASTELBO_UNROLL
  for (int round = 0; round < 10; ++round) {
    FASTELBO_UNROLL
    for (int i = 0; i < n; ++i) {
      Words high0, low0, high1, low1;
      multiply_wide(c0[i], kPhiloxM0, high0, low0);
      multiply_wide(c2[i], kPhiloxM1, high1, low1);
      c0[i] = high1 ^ c1[i] ^ keys.k0[round];
      c2[i] = high0 ^ c3[i] ^ keys.k1[round];
      c1[i] = low1;
      c3[i] = low0;
    }
  }
}

// The uniform of a word: u = word * 2^-32 + 2^-33 in (0, 1], from the word rounded to float32.
template <class V>
FASTELBO_INLINE V uniform(V word) {
  return fma(word, V(0x1p-32f), V(0x1p-33f));
}

// Two uniforms to two independent normals: n0 = r cos(2 pi u1), n1 = r sin(2 pi u1), r = sqrt(-2 ln u0).
template <class V>
FASTELBO_INLINE void box_muller(V u0, V u1, V& n0, V& n1) {
  // u0 rounds to 1 at most, where an approximate logarithm may come out above 0.
  V r = sqrt_of_positive_part(V(-2.0f) * log_normalised(u0));
  V sine, cosine;
  sincos_2pi(u1, sine, cosine);
  n0 = r * cosine;
  n1 = r * sine;
}
