package policy

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Origins have the form HOST[:PORT]/PATH, or file:/PATH for a directory of this
// host; a pattern is an origin or prefix/**.

// parseOriginPattern reads one of trusted_origins.
func parseOriginPattern(text string) (span, error) {
	if text == "**" {
		return span{below: true}, nil
	}
	base, below := strings.CutSuffix(text, "/**")
	host, path, _ := strings.Cut(base, "/")
	host, ok := originHost(strings.ToLower(host), "")
	if !below {
		path = strings.TrimSuffix(path, ".git")
	}
	if !ok || path == "" && !below || path != "" && !cleanOriginPath(path) {
		return span{}, fmt.Errorf("trusted origin %q is no pattern; want for example \"github.com/my-org/**\" or \"file:/srv/git/**\"", text)
	}
	if path == "" {
		return span{host, true}, nil
	}
	return span{host + "/" + path, below}, nil
}

// TrustedRepo labels a repository by the URLs of its remotes, taken from its own
// record and already rewritten (url.*.insteadOf). It is trusted when it has none,
// or when each lies in trusted_origins; what is not understood is not trusted,
// nor is what arrives over a transport that authenticates nobody. why says so in
// a sentence.
func TrustedRepo(p *Policy, remotes []string) (trusted bool, why string) {
	if len(remotes) == 0 {
		return true, "it has no remote"
	}
	for _, remote := range remotes {
		origin, err := originOf(remote)
		if err != nil {
			return false, fmt.Sprintf("remote %q %v", remote, err)
		}
		if p == nil || !p.origins.holds(span{base: origin}) {
			return false, fmt.Sprintf("remote %s is not in trusted_origins", origin)
		}
	}
	return true, "all its remotes are in trusted_origins"
}

var errNotUnderstood = errors.New("is not understood")

// originOf turns a remote's URL into an origin.
func originOf(remote string) (string, error) {
	scheme, rest, isURL := strings.Cut(remote, "://")
	if !isURL {
		return originOfPath(remote)
	}
	authority, path, _ := strings.Cut(rest, "/")
	authority, ok := withoutUser(authority)
	if !ok {
		return "", errNotUnderstood
	}
	port := ""
	switch scheme {
	case "https":
		port = "443"
	case "ssh", "git+ssh", "ssh+git":
		port = "22"
	case "file":
		if authority != "" && authority != "localhost" {
			return "", errors.New("names a directory of another host")
		}
		authority = "file:"
	case "http", "git", "ftp", "ftps":
		return "", fmt.Errorf("uses %s, which does not prove who answers", scheme)
	default:
		return "", fmt.Errorf("uses the unknown transport %q", scheme)
	}
	return joinOrigin(authority, port, path)
}

// originOfPath reads what is no URL: a directory, or [user@]host:path as ssh
// and git read it, with a colon before the first slash.
func originOfPath(remote string) (string, error) {
	if strings.HasPrefix(remote, "/") {
		return joinOrigin("file:", "", remote[1:])
	}
	host, path, ok := strings.Cut(remote, ":")
	if !ok || strings.Contains(host, "/") {
		return "", errors.New("is a relative path; its place is not known")
	}
	if strings.HasPrefix(path, ":") {
		return "", fmt.Errorf("uses the remote helper %q", host)
	}
	host, ok = withoutUser(host)
	if !ok || len(host) < 2 {
		return "", errNotUnderstood // a drive letter, or nothing
	}
	return joinOrigin(host, "", strings.TrimPrefix(path, "/"))
}

// withoutUser cuts USER[:PASSWORD]@ off. URL readers disagree about where the
// host begins when anything but plain characters comes before it, or two @:
// https://evil.example?@github.com/my-org/app.
func withoutUser(authority string) (host string, ok bool) {
	user, host, found := strings.Cut(authority, "@")
	if !found {
		return authority, true
	}
	for i := range len(user) {
		switch c := user[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', strings.IndexByte("-._~!$&'()*+,;=:%", c) >= 0:
		default:
			return "", false
		}
	}
	return host, true // a second @ makes it no host
}

func joinOrigin(host, defaultPort, path string) (string, error) {
	path = strings.TrimSuffix(strings.TrimSuffix(path, "/"), ".git")
	host, ok := originHost(strings.ToLower(host), defaultPort)
	if !ok || !cleanOriginPath(path) {
		return "", errNotUnderstood
	}
	return host + "/" + path, nil
}

// originHost checks HOST[:PORT] and leaves out the default port.
func originHost(host, defaultPort string) (string, bool) {
	if host == "file:" {
		return host, true
	}
	name, port, hasPort := strings.Cut(host, ":")
	if hasPort {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 || port != strconv.FormatUint(n, 10) {
			return "", false
		}
		if port == defaultPort {
			host = name
		}
	}
	_, ok := readPeer(name)
	return host, ok
}

// cleanOriginPath refuses what a server could decode, fold or cut.
func cleanOriginPath(path string) bool {
	for i := range len(path) {
		if c := path[i]; c <= ' ' || c == 0x7f || strings.IndexByte(`%?#\*:@`, c) >= 0 {
			return false
		}
	}
	return cleanPath(path) && path != "."
}
