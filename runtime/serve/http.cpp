#include "http.h"

#include <sys/socket.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <limits>
#include <utility>

#include "completions.h"
#include "connection_threads.h"
#include "lora_adapters.h"
#include "openapi.h"
#include "schemas.h"
#include "tokenization.h"

namespace chameleon::serve {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds kReadTime{30};   // for a whole body
constexpr std::chrono::seconds kWriteTime{60};  // for a client to read one part of an answer
constexpr int kKeepAliveSeconds = 5;
constexpr std::size_t kKeepAliveRequests = 100'000;
constexpr int kBacklog = 2048;
constexpr int kClientGone = 499;  // nginx's word for it: nobody reads the answer

// httplib would compress "application/json", which costs more time than the bytes are worth.
constexpr const char* kJsonType = "application/json; charset=utf-8";

/// The request that this thread works on: httplib serves it on one thread, from its routing to its log.
struct Current {
  std::string id;
  Clock::time_point start;
  std::optional<std::string> body{};  // to be logged
  bool is_body_read = false;
};
thread_local Current current;

void begin(const httplib::Request& request, httplib::Response& response) {
  current = {.id = request_id(request.get_header_value("X-Request-Id")), .start = Clock::now()};
  response.set_header("X-Request-Id", current.id);
}

void set_json(httplib::Response& response, const Json& json) {
  response.status = httplib::StatusCode::OK_200;
  response.set_content(to_text(json), kJsonType);
}

bool has_body(const httplib::Request& request) {
  return request.has_header("Transfer-Encoding") || request.get_header_value_u64("Content-Length") > 0;
}

std::string read_body(const httplib::Request& request, const httplib::ContentReader& reader, std::size_t max_bytes) {
  if (!has_body(request)) return "";
  if (request.is_multipart_form_data()) throw ApiError(400, "input_invalid", "the body is not valid: send JSON");
  std::string body;
  std::size_t size = 0;
  const auto end = Clock::now() + kReadTime;
  const bool is_whole = reader([&](const char* data, std::size_t length) {
    size += length;
    if (size <= max_bytes) body.append(data, length);  // the rest is read too: a client that still sends sees no answer
    return Clock::now() < end;
  });
  current.is_body_read = is_whole;
  if (!is_whole) throw ApiError(400, "body_incomplete", "the body did not arrive whole within 30 seconds");
  if (size > max_bytes) {
    throw ApiError(
        413, "body_too_large",
        "the body has " + std::to_string(size) + " bytes, at most " + std::to_string(max_bytes) + " are taken");
  }
  return body;
}

/// Whether a path is one of a pattern such as "/v1/models/:model".
bool matches(std::string_view pattern, std::string_view path) {
  const std::size_t colon = pattern.find(':');
  if (colon == std::string_view::npos) return path == pattern;
  return path.size() > colon && path.starts_with(pattern.substr(0, colon)) && path.find('/', colon) == path.npos;
}

std::unique_ptr<httplib::Server> make_server(const Address& address) {
  if (!address.certificate) return std::make_unique<httplib::Server>();
  // The key may be in the certificate's file.
  auto server = std::make_unique<httplib::SSLServer>(address.certificate->c_str(),
                                                     address.key.value_or(*address.certificate).c_str());
  if (!server->is_valid()) {
    throw InputError(address.certificate->string() + ": not a TLS certificate in PEM with its private key");
  }
  return server;
}

/// Returns the port.
int listen_on(httplib::Server& server, const Address& address) {
  int listening = -1;
  server.set_socket_options([&listening](int socket) {  // without httplib's SO_REUSEPORT: a port in use is an error
    const int yes = 1;
    ::setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    listening = socket;
  });
  errno = 0;
  const int port = address.port == 0                                 ? server.bind_to_any_port(address.host)
                   : server.bind_to_port(address.host, address.port) ? address.port
                                                                     : -1;
  if (port < 0) {
    throw InputError("cannot listen on " + address.host + " port " + std::to_string(address.port) + ": " +
                     (errno != 0 ? std::strerror(errno) : "there is no such address"));
  }
  ::listen(listening, kBacklog);  // httplib's own backlog is 5
  return port;
}

void answer_completion(const Call& call, const httplib::Request& request, httplib::Response& response) {
  const std::shared_ptr<Job> job = prepare(CompletionRequest::of(call.body), call.served, call.tenant, current.id);
  const auto prompts = std::make_shared<const std::vector<Echo>>(echoes(*job, call.tenant));
  const auto is_connected = [&request] { return !request.is_connection_closed(); };
  if (!job->request.stream) {
    const std::optional<Json> answer = complete(*job, *prompts, is_connected);
    if (answer) {
      set_json(response, *answer);
    } else {
      response.status = kClientGone;
    }
    return;
  }
  response.status = httplib::StatusCode::OK_200;
  response.set_header("Cache-Control", "no-store");
  // httplib calls this while the request is still there.
  const auto send = [job, prompts, is_connected, counted = call.counted](std::size_t, httplib::DataSink& sink) {
    stream(*job, *prompts, is_connected,
           [&sink](std::string_view text) { return sink.write(text.data(), text.size()); });
    sink.done();
    return true;
  };
  response.set_chunked_content_provider("text/event-stream", send);
}

}  // namespace

HttpServer::HttpServer(Service& service, const Log& log, const Address& address)
    : service_(service), log_(log), server_(make_server(address)) {
  server_->new_task_queue = [] { return new ConnectionThreads; };
  server_->set_keep_alive_timeout(kKeepAliveSeconds);
  server_->set_keep_alive_max_count(kKeepAliveRequests);
  server_->set_read_timeout(kReadTime);
  server_->set_write_timeout(kWriteTime);
  server_->set_tcp_nodelay(true);
  add_routes();
  add_hooks();
  const std::string host = address.host.find(':') == std::string::npos ? address.host : "[" + address.host + "]";
  const int port = listen_on(*server_, address);
  url_ = (address.certificate ? "https://" : "http://") + host + ":" + std::to_string(port);
}

void HttpServer::add_routes() {
  get("/v1/models", [](const auto&, Served& served) { return served.models.list(); });
  get("/v1/models/:model",
      [](const auto& request, Served& served) { return served.models.get(request.path_params.at("model")); });
  get("/tokenizer_info", [](const auto&, Served& served) { return tokenizer_info(served); });
  post("/tokenize", [](const Call& call, const auto&, auto& response) {
    set_json(response, tokenize(TokenizeRequest::of(call.body), call.served));
  });
  post("/detokenize", [](const Call& call, const auto&, auto& response) {
    set_json(response, detokenize(DetokenizeRequest::of(call.body), call.served));
  });
  post("/v1/completions",
       [](const Call& call, const auto& request, auto& response) { answer_completion(call, request, response); });
  post("/v1/load_lora_adapter", [](const Call& call, const auto&, auto& response) {
    set_json(response, load(LoadAdapterRequest::of(call.body), call.served));
  });
  post("/v1/unload_lora_adapter", [](const Call& call, const auto&, auto& response) {
    set_json(response, unload(UnloadAdapterRequest::of(call.body), call.served));
  });
  get_without_key("/health", [this](auto& response) {
    service_.check_health();
    set_json(response, {{"status", "ok"}});
  });
  get_without_key("/version", [this](auto& response) {
    const Runtime& runtime = service_.served().runtime;
    const Json version = {{"version", CHAMELEON_VERSION},
                          {"bundle_digest", runtime.bundle().digest},
                          {"provider", runtime.provider()},
                          {"precision", runtime.manifest().precision}};
    set_json(response, version);
  });
  get_without_key("/metrics", [this](auto& response) {
    response.set_content(service_.metrics().text(), "text/plain; version=0.0.4; charset=utf-8");
  });
  get_without_key("/openapi.json", [](auto& response) { response.set_content(std::string(kOpenApi), kJsonType); });
}

void HttpServer::get_without_key(const char* path, std::function<void(httplib::Response&)> answer) {
  routes_.emplace_back("GET", path);
  server_->Get(path, [answer = std::move(answer)](const auto&, auto& response) { answer(response); });
}

void HttpServer::get(const char* path, std::function<Json(const httplib::Request&, Served&)> answer) {
  routes_.emplace_back("GET", path);
  server_->Get(path, [this, answer = std::move(answer)](const auto& request, auto& response) {
    (void)service_.keys().tenant(request.get_header_value("Authorization"));
    Served& served = service_.served();
    const auto counted = service_.begin_request();
    set_json(response, answer(request, served));
  });
}

void HttpServer::post(const char* path,
                      std::function<void(const Call&, const httplib::Request&, httplib::Response&)> answer) {
  routes_.emplace_back("POST", path);
  server_->Post(path, [this, answer = std::move(answer)](const auto& request, auto& response, const auto& reader) {
    answer(begin_call(request, reader), request, response);
  });
}

Call HttpServer::begin_call(const httplib::Request& request, const httplib::ContentReader& reader) {
  std::optional<std::string> tenant = service_.keys().tenant(request.get_header_value("Authorization"));
  Served& served = service_.served();
  std::string body = read_body(request, reader, service_.settings().max_body_bytes);
  if (service_.settings().log_prompts) current.body = body;
  return {std::move(body), std::move(tenant), served, service_.begin_request()};
}

void HttpServer::add_hooks() {
  server_->set_pre_routing_handler([this](const auto& request, auto& response) {
    begin(request, response);
    const std::optional<ApiError> error = find_fault(request);
    if (error) refuse(response, *error);
    return error ? httplib::Server::HandlerResponse::Handled : httplib::Server::HandlerResponse::Unhandled;
  });
  server_->set_exception_handler([this](const auto&, auto& response, const std::exception_ptr& exception) {
    try {
      std::rethrow_exception(exception);
    } catch (const std::exception& error) {
      const ApiError answer = api_error(error);
      if (answer.code == "internal_error") log_.error(error.what(), {{"request_id", current.id}});
      refuse(response, answer);
    }
  });
  server_->set_error_handler([this](const auto& request, auto& response) {
    if (!response.body.empty() || response.status == kClientGone) return;
    // The others are httplib's, of what is no HTTP.
    if (!response.has_header("X-Request-Id")) begin(request, response);
    refuse(response, ApiError(response.status, "error", httplib::status_message(response.status)));
  });
  server_->set_post_routing_handler([](const auto& request, auto& response) {
    if (!has_body(request) || current.is_body_read) return;
    response.headers.erase("Keep-Alive");  // what follows on this connection is a body that nobody has read
    response.set_header("Connection", "close");
  });
  server_->set_logger([this](const auto& request, const auto& response) {
    const double seconds = Seconds(Clock::now() - current.start).count();
    Json fields = {{"request_id", current.id},
                   {"method", request.method},
                   {"path", request.path},
                   {"status", response.status},
                   {"seconds", std::round(seconds * 1e4) / 1e4}};
    if (current.body) fields["body"] = *current.body;
    log_.info(request.method + " " + request.path + " " + std::to_string(response.status), fields);
  });
}

std::optional<ApiError> HttpServer::find_fault(const httplib::Request& request) const {
  const std::string method = request.method == "HEAD" ? "GET" : request.method;
  bool is_path_known = false;
  for (const auto& [its_method, pattern] : routes_) {
    if (!matches(pattern, request.path)) continue;
    if (its_method == method) return std::nullopt;
    is_path_known = true;
  }
  if (is_path_known) return ApiError(405, "method_not_allowed", request.path + " does not take " + request.method);
  return ApiError(404, "not_found", "there is no " + request.path + " here");
}

void HttpServer::refuse(httplib::Response& response, const ApiError& error) {
  service_.metrics().reject(error.code);
  response.status = error.status;
  response.set_content(to_text(error.body()), kJsonType);
  if (error.status == 429 || error.status == 503) response.set_header("Retry-After", "1");
  if (error.status == 401) response.set_header("WWW-Authenticate", "Bearer");
}

}  // namespace chameleon::serve
