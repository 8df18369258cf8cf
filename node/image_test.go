package node

import (
	"reflect"
	"testing"

	"cal/machine"
	"cal/machine/fake"
	"cal/nucleus"
)

// imaged is a driver with an image of its own.
type imaged struct{ machine.Driver }

func (imaged) UsualImage() nucleus.Image { return nucleus.Image{Kind: nucleus.ImageDebian} }

func TestUsualImage(t *testing.T) {
	layers, env := []nucleus.Layer{{Name: "go", Host: "/go", Guest: "/opt/toolchains/go"}}, map[string]string{"PATH": "/opt/toolchains/go/bin"}
	plain := fake.New(fake.Config{})
	for _, c := range []struct {
		name        string
		driver      machine.Driver
		image, want nucleus.Image
	}{
		{"none is named", plain, nucleus.Image{Layers: layers, Env: env}, nucleus.Image{Kind: "host", Layers: layers, Env: env}},
		{"none is named, and the driver has another", imaged{plain}, nucleus.Image{Layers: layers, Env: env}, nucleus.Image{Kind: "debian"}},
		{"the host is named", imaged{plain}, nucleus.Image{Kind: "host", Layers: layers, Env: env}, nucleus.Image{Kind: "host", Layers: layers, Env: env}},
		{"another is named", plain, nucleus.Image{Kind: "oci", Ref: "a"}, nucleus.Image{Kind: "oci", Ref: "a"}},
	} {
		if got := usualImage(c.image, c.driver); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
}
