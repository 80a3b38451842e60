//! ImageService over the image store.

use super::{Answers, CriService, chunks};
use crate::error::CriError;
use crate::stats::filesystem_usage;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use orlop_image::{Auth, Image};
use orlop_proto::cri;
use orlop_proto::cri::image_service_server::ImageService;
use std::collections::HashMap;
use tonic::{Request, Response, Status, async_trait};

fn to_cri(image: &Image) -> cri::Image {
    let user = image.config.config().as_ref().and_then(|c| c.user().clone()).unwrap_or_default();
    let name = user.split(':').next().unwrap_or_default();
    // A number is an id, anything else a name; nothing at all is root.
    let (uid, username) = match name.parse::<i64>() {
        Ok(uid) => (Some(uid), String::new()),
        Err(_) if name.is_empty() => (Some(0), String::new()),
        Err(_) => (None, name.to_owned()),
    };
    cri::Image {
        id: image.id.clone(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size.max(1),
        uid: uid.map(|value| cri::Int64Value { value }),
        username,
        spec: Some(cri::ImageSpec {
            image: image.id.clone(),
            annotations: image.annotations.clone().into_iter().collect(),
            ..Default::default()
        }),
        pinned: image.pinned,
    }
}

fn info(image: &Image) -> HashMap<String, String> {
    let info = serde_json::json!({ "imageSpec": image.config, "layers": image.layers });
    HashMap::from([("info".to_owned(), info.to_string())])
}

/// The kubelet sends a name and a password, or both joined in `auth`.
fn to_auth(auth: cri::AuthConfig) -> Result<Auth, CriError> {
    let mut username = auth.username;
    let mut password = auth.password;
    if username.is_empty() && !auth.auth.is_empty() {
        let invalid = || CriError::Invalid {
            field: "auth",
            reason: "it is not the base64 form of USER:PASSWORD".into(),
        };
        let decoded = STANDARD.decode(auth.auth.trim()).map_err(|_| invalid())?;
        let decoded = String::from_utf8(decoded).map_err(|_| invalid())?;
        let (user, secret) = decoded.split_once(':').ok_or_else(invalid)?;
        username = user.to_owned();
        password = secret.trim_end_matches('\0').to_owned();
    }
    Ok(Auth {
        username,
        password,
        identity_token: auth.identity_token,
        registry_token: auth.registry_token,
        server_address: auth.server_address,
    })
}

impl CriService {
    fn list(&self, filter: Option<cri::ImageFilter>) -> Vec<cri::Image> {
        let wanted = filter.and_then(|f| f.image).map(|i| i.image).unwrap_or_default();
        if wanted.is_empty() {
            return self.runtime.images.list().iter().map(|i| to_cri(i)).collect();
        }
        self.runtime.images.find(&wanted).iter().map(|i| to_cri(i)).collect()
    }

    async fn pull(&self, request: cri::PullImageRequest) -> Result<String, CriError> {
        let reference = request.image.map(|i| i.image).unwrap_or_default();
        if reference.is_empty() {
            return Err(CriError::Invalid { field: "image", reason: "it is empty".into() });
        }
        let auth = request.auth.map(to_auth).transpose()?;
        match self.runtime.images.pull(&reference, auth.as_ref()).await {
            Ok(image) => Ok(image.id.clone()),
            Err(source) if source.is_registry_unavailable() => {
                Err(CriError::RegistryUnavailable { reference, source })
            }
            Err(source) => Err(CriError::Pull { reference, source }),
        }
    }
}

#[async_trait]
impl ImageService for CriService {
    async fn list_images(
        &self,
        request: Request<cri::ListImagesRequest>,
    ) -> Result<Response<cri::ListImagesResponse>, Status> {
        Ok(Response::new(cri::ListImagesResponse { images: self.list(request.into_inner().filter) }))
    }

    type StreamImagesStream = Answers<cri::StreamImagesResponse>;

    async fn stream_images(
        &self,
        request: Request<cri::StreamImagesRequest>,
    ) -> Result<Response<Self::StreamImagesStream>, Status> {
        let images = self.list(request.into_inner().filter);
        Ok(Response::new(chunks(&images, |images| cri::StreamImagesResponse { images })))
    }

    async fn image_status(
        &self,
        request: Request<cri::ImageStatusRequest>,
    ) -> Result<Response<cri::ImageStatusResponse>, Status> {
        let request = request.into_inner();
        let reference = request.image.map(|i| i.image).unwrap_or_default();
        let image = self.runtime.images.find(&reference);
        Ok(Response::new(cri::ImageStatusResponse {
            info: image.as_ref().filter(|_| request.verbose).map(|i| info(i)).unwrap_or_default(),
            image: image.as_ref().map(|i| to_cri(i)),
        }))
    }

    /// Dropped with the call: the store stops a pull that nobody waits for.
    async fn pull_image(
        &self,
        request: Request<cri::PullImageRequest>,
    ) -> Result<Response<cri::PullImageResponse>, Status> {
        let image_ref = self.pull(request.into_inner()).await?;
        Ok(Response::new(cri::PullImageResponse { image_ref }))
    }

    async fn remove_image(
        &self,
        request: Request<cri::RemoveImageRequest>,
    ) -> Result<Response<cri::RemoveImageResponse>, Status> {
        let reference = request.into_inner().image.map(|i| i.image).unwrap_or_default();
        if reference.is_empty() {
            return Err(CriError::Invalid { field: "image", reason: "it is empty".into() }.into());
        }
        self.runtime.images.remove(&reference).await.map_err(CriError::from)?;
        Ok(Response::new(cri::RemoveImageResponse {}))
    }

    async fn image_fs_info(
        &self,
        _request: Request<cri::ImageFsInfoRequest>,
    ) -> Result<Response<cri::ImageFsInfoResponse>, Status> {
        let usage = self.runtime.images.usage().await.map_err(CriError::from)?;
        let config = &self.runtime.config;
        let of = |directory| vec![filesystem_usage(directory, usage, crate::runtime::now())];
        Ok(Response::new(cri::ImageFsInfoResponse {
            image_filesystems: of(&config.image_root),
            container_filesystems: of(&config.container_root),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joined_credentials_are_taken_apart() {
        let auth =
            |text: &str| to_auth(cri::AuthConfig { auth: STANDARD.encode(text), ..Default::default() });
        let good = auth("me:se:cret").unwrap();
        assert_eq!((good.username.as_str(), good.password.as_str()), ("me", "se:cret"));
        assert!(auth("nothing").is_err());
        assert!(to_auth(cri::AuthConfig { auth: "%%".into(), ..Default::default() }).is_err());
    }
}
