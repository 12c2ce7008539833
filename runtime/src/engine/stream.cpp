#include "engine/stream.h"

namespace chameleon {

Stream::State::State(std::vector<TokenIds> prompt_ids, std::vector<std::int64_t> clusters, Mode used,
                     std::size_t continuations, OnToken callback, std::stop_token stopping)
    : prompts(std::move(prompt_ids)),
      cluster_ids(std::move(clusters)),
      mode(used),
      n(continuations),
      stop(std::move(stopping)),
      on_token_(std::move(callback)),
      unwanted_(prompts.size() * n),
      cached_tokens_(prompts.size()),
      generations_(prompts.size() * n),
      running_(prompts.size() * n) {}

void Stream::State::set_cohort(Cohort joined) {
  const std::lock_guard lock(mutex_);
  cohort_ = joined;
}

void Stream::State::set_cached_tokens(std::size_t prompt, std::size_t tokens) {
  const std::lock_guard lock(mutex_);
  cached_tokens_[prompt] = tokens;
}

void Stream::State::call_back(const Token& token) {
  if (on_token_ && !on_token_(token)) unwanted_[token.row] = true;
}

void Stream::State::deliver(const Token& token) {
  try {  // before the generation is known to a waiting thread, which may then destroy what the callback uses
    call_back(token);
  } catch (...) {
    unwanted_[token.row] = true;
  }
  const std::lock_guard lock(mutex_);
  if (!on_token_) tokens_.push_back(token);
  if (token.generation != nullptr) {
    generations_[token.row] = token.generation;
    --running_;
  }
  changed_.notify_all();
}

Stream::Stream(std::shared_ptr<State> state) : state_(std::move(state)) {}

std::optional<Token> Stream::next() const {
  std::unique_lock lock(state_->mutex_);
  state_->changed_.wait(lock, [&] { return !state_->tokens_.empty() || state_->running_ == 0; });
  if (state_->tokens_.empty()) return std::nullopt;
  Token token = std::move(state_->tokens_.front());
  state_->tokens_.pop_front();
  return token;
}

bool Stream::wait(Seconds timeout) const {
  std::unique_lock lock(state_->mutex_);
  return state_->changed_.wait_for(lock, bounded(timeout),
                                   [&] { return !state_->tokens_.empty() || state_->running_ == 0; });
}

std::vector<Generation> Stream::result() const {
  std::unique_lock lock(state_->mutex_);
  state_->changed_.wait(lock, [&] { return state_->running_ == 0; });
  std::vector<Generation> generations;
  for (const auto& generation : state_->generations_) generations.push_back(*generation);
  return generations;
}

bool Stream::done() const {
  const std::lock_guard lock(state_->mutex_);
  return state_->running_ == 0;
}

void Stream::cancel() const { state_->cancelled = true; }

const std::vector<TokenIds>& Stream::prompts() const { return state_->prompts; }
const std::vector<std::int64_t>& Stream::cluster_ids() const { return state_->cluster_ids; }
Mode Stream::mode() const { return state_->mode; }
std::size_t Stream::n() const { return state_->n; }

std::vector<std::size_t> Stream::cached_tokens() const {
  const std::lock_guard lock(state_->mutex_);
  return state_->cached_tokens_;
}

std::optional<Cohort> Stream::cohort() const {
  const std::lock_guard lock(state_->mutex_);
  return state_->cohort_;
}

}  // namespace chameleon
