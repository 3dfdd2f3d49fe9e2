// The functions of a sampler's program (sampling.h). Templates over the value type V; see math/philox.h for how these
// files are included. The includer supplies gelu, which takes the error function.

// Of one operand or two.
template <class V>
FASTELBO_INLINE V apply(int64_t function, V a, V b, float p, float q) {
  switch (function) {
    case kRelu: return relu(a);
    case kElu: return select(a > V(0.0f), a, V(p) * expm1(a));
    case kLeakyRelu: return select(a > V(0.0f), a, V(p) * a);
    case kSigmoid: return sigmoid(a);
    case kTanh: return tanh(a);
    case kSilu: return a * sigmoid(a);
    case kGelu: return gelu(a);
    case kGeluTanh: return V(0.5f) * a * (V(1.0f) + tanh(V(0.79788456080286536f) * fma(V(0.044715f) * a * a, a, a)));
    case kSoftplus: return select(V(p) * a > V(q), a, log1p(exp(min(V(p) * a, V(q)))) / V(p));
    case kExp: return exp(a);
    case kAbs: return abs(a);
    case kClamp: return select(a < V(p), V(p), select(a > V(q), V(q), a));
    case kAffine: return a * V(p) + V(q);
    case kAdd: return a + b;
    case kSub: return a - b;
    case kMul: return a * b;
    case kDiv: return a / b;
    case kPrelu: return select(a > V(0.0f), a, b * a);
    case kTanhSigmoid: return tanh(a) * sigmoid(b);
    case kGlu: return a * sigmoid(b);
    default: return a;
  }
}

FASTELBO_INLINE float as_number(int64_t bits) {
  uint32_t word = uint32_t(bits);
  float x;
  __builtin_memcpy(&x, &word, 4);
  return x;
}
