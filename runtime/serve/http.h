// cpp-httplib around the service: routes, keys, limits, bodies, errors and the request log.
#pragma once

#include <httplib.h>

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "logs.h"
#include "service.h"

namespace chameleon::serve {

/// Where to listen. Both files make it TLS.
struct Address {
  std::string host = "127.0.0.1";
  int port = 8000;                                        ///< 0 takes a free one
  std::optional<std::filesystem::path> certificate, key;  ///< PEM
};

/// A request that was let in.
struct Call {
  std::string body;
  std::optional<std::string> tenant;  ///< of its API key
  Served& served;
  std::shared_ptr<void> counted;  ///< it is worked on for as long as this lives
};

/// Answers requests of a service, which may still be loading.
class HttpServer {
 public:
  /// Listen on an address. Throws InputError for one that cannot be had.
  HttpServer(Service& service, const Log& log, const Address& address);

  [[nodiscard]] std::string url() const { return url_; }
  /// Accept connections until `stop`, and wait until they have ended.
  void run() { server_->listen_after_bind(); }
  void stop() {
    server_->wait_until_ready();  // before that, httplib would do nothing
    server_->stop();
  }

 private:
  void add_routes();
  void add_hooks();
  void get_without_key(const char* path, std::function<void(httplib::Response&)> answer);
  void get(const char* path, std::function<Json(const httplib::Request&, Served&)> answer);
  void post(const char* path, std::function<void(const Call&, const httplib::Request&, httplib::Response&)> answer);

  Call begin_call(const httplib::Request& request, const httplib::ContentReader& reader);
  /// What is wrong with a request's path or method.
  [[nodiscard]] std::optional<ApiError> find_fault(const httplib::Request& request) const;
  void refuse(httplib::Response& response, const ApiError& error);

  Service& service_;
  const Log& log_;
  std::unique_ptr<httplib::Server> server_;
  std::vector<std::pair<std::string, std::string>> routes_;  // method and path
  std::string url_;
};

}  // namespace chameleon::serve
