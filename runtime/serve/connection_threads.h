#pragma once

#include <httplib.h>

#include <condition_variable>
#include <cstddef>
#include <functional>
#include <mutex>

namespace chameleon::serve {

/// Gives each connection a thread of its own: a stream holds its thread until it ends, and so does a client that sends
/// nothing.
class ConnectionThreads final : public httplib::TaskQueue {
 public:
  /// False, which closes the connection, where there are too many.
  bool enqueue(std::function<void()> serve_connection) override;
  /// Wait until all connections have ended.
  void shutdown() override;

 private:
  std::mutex mutex_;
  std::condition_variable ended_;
  std::size_t running_ = 0;
};

}  // namespace chameleon::serve
