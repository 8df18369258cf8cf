package image

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
)

// hostRoot is the read-only view of the host's programs. Where /bin and its like
// are links, as on a host with a merged /usr, they are links in the machine too.
func hostRoot(host string) (Root, error) {
	root := Root{Links: map[string]string{}, Files: map[string][]byte{}}
	usr := filepath.Join(host, "usr")
	if info, err := os.Stat(usr); err != nil {
		return Root{}, err
	} else if !info.IsDir() {
		return Root{}, &fs.PathError{Op: "open", Path: usr, Err: errors.New("not a directory")}
	}
	root.Binds = append(root.Binds, Bind{usr, "/usr"})
	for _, name := range []string{"bin", "sbin", "lib", "lib32", "lib64", "libx32"} {
		if err := root.program(host, name); err != nil {
			return Root{}, err
		}
	}
	if err := root.hostEtc(host); err != nil {
		return Root{}, err
	}
	maps.Copy(root.Files, generated(nil, nil))
	return root, nil
}

func (r *Root) program(host, name string) error {
	place := filepath.Join(host, name)
	info, err := os.Lstat(place)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode()&fs.ModeSymlink == 0 {
		r.Binds = append(r.Binds, Bind{place, "/" + name})
		return nil
	}
	target, err := os.Readlink(place)
	if err != nil {
		return err
	}
	r.Links["/"+name] = target
	return nil
}

// What programs need of /etc. None of it holds a secret on any known host, and
// a file of it that `other` cannot read is left out all the same.
var (
	etcDirs = []string{
		"alternatives", "ssl/certs", "ca-certificates", "pki/ca-trust/extracted", "pki/tls/certs", "crypto-policies",
		"ld.so.conf.d", "terminfo", "java*", "python*", "perl", "fonts", "ImageMagick-*",
	}
	etcFiles = []string{
		"ld.so.cache", "ld.so.conf", "ssl/openssl.cnf", "ssl/cert.pem", "ca-certificates.conf", "localtime", "timezone",
		"mime.types", "magic", "services", "protocols", "rpc", "ethertypes", "inputrc", "os-release", "debian_version",
		"alpine-release", "redhat-release", "locale.conf", "locale.alias", "papersize", "shells", "xattr.conf",
	}
)

func (r *Root) hostEtc(host string) error {
	for _, pattern := range etcDirs {
		places, err := filepath.Glob(filepath.Join(host, "etc", pattern))
		if err != nil {
			return err
		}
		for _, place := range places {
			if info, err := os.Lstat(place); err == nil && info.IsDir() && info.Mode().Perm()&0o005 == 0o005 {
				r.Binds = append(r.Binds, Bind{place, "/" + strings.TrimPrefix(strings.TrimPrefix(place, host), "/")})
			}
		}
	}
	for _, name := range etcFiles {
		if err := r.copyEntry(filepath.Join(host, "etc", name), "/etc/"+name); err != nil {
			return err
		}
	}
	return nil
}

// largestCopy bounds a file that is copied into a skeleton.
const largestCopy = 4 << 20

// copyEntry takes over a link as a link, and a regular file that everybody can
// read. What is missing, too large or private is left out.
func (r *Root) copyEntry(place, guest string) error {
	info, err := os.Lstat(place)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		return nil
	}
	if err != nil {
		return err
	}
	switch {
	case info.Mode()&fs.ModeSymlink != 0:
		target, err := os.Readlink(place)
		if err == nil {
			r.Links[guest] = target
		}
		return err
	case info.Mode().IsRegular() && info.Mode().Perm()&0o004 != 0 && info.Size() <= largestCopy:
		data, err := os.ReadFile(place)
		if err == nil {
			r.Files[guest] = data
		}
		return err
	}
	return nil
}
