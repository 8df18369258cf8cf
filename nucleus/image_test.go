package nucleus

import (
	"reflect"
	"strings"
	"testing"
)

func TestParseImage(t *testing.T) {
	for text, want := range map[string]Image{
		"": {}, "host": {Kind: ImageHost}, "debian": {Kind: ImageDebian}, "debian@trixie": {Kind: ImageDebian, Suite: "trixie"},
		"debian:python3,g++":                  {Kind: ImageDebian, Packages: []string{"python3", "g++"}},
		"debian@sid:golang-1.26=1.26.1~rc1-2": {Kind: ImageDebian, Suite: "sid", Packages: []string{"golang-1.26=1.26.1~rc1-2"}},
		"oci:docker.io/library/debian:12":     {Kind: ImageOCI, Ref: "docker.io/library/debian:12"},
		"oci:localhost:5000/a/b@sha256:abc":   {Kind: ImageOCI, Ref: "localhost:5000/a/b@sha256:abc"},
		"tarball:/images/a b:c.tar.gz":        {Kind: ImageTarball, Path: "/images/a b:c.tar.gz"},
		"directory:/srv/root":                 {Kind: ImageDirectory, Path: "/srv/root"},
	} {
		got, err := ParseImage(text)
		if err != nil || !reflect.DeepEqual(got, want) || got.String() != text {
			t.Errorf("%q: %+v %q, %v", text, got, got, err)
		}
	}
	for _, text := range []string{
		"docker:x", "host:x", "host@x", "Host", "debian@", "debian:", "debian:a,,b", "debian:-oAPT::x=y", "debian:Python", "debian:a b", "debian@../x", "debian@-x",
		"debian:a=", "debian:" + strings.Repeat("aa,", mostPackages) + "aa", "oci", "oci:", "oci:-x", "oci:a b", "oci:http://x/y?z", "oci:../x", "tarball:", "tarball:relative.tar", "directory:", "directory:x", "directory:/a\nb",
	} {
		if got, err := ParseImage(text); err == nil {
			t.Errorf("%q: %+v", text, got)
		}
	}
}

func TestImageCheckTakesNoFieldOfAnotherKind(t *testing.T) {
	for _, image := range []Image{
		{Kind: ImageHost, Path: "/x"}, {Kind: ImageHost, Packages: []string{"git"}}, {Kind: ImageOCI, Ref: "a", Path: "/x"}, {Kind: ImageDebian, Ref: "a"},
		{Kind: ImageDirectory, Path: "/x", Suite: "sid"}, {Path: "/x"}, {Ref: "a"}, {Kind: ImageDirectory}, {Kind: "vm"},
	} {
		if err := image.Check(); err == nil {
			t.Errorf("%+v is taken", image)
		}
	}
}
